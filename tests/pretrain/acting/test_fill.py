"""Acting by filling in: what a query shows, what the answer may depend on, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pretrain.acting.acting_fixtures import model
from tests.pretrain.token_fixtures import ARM, ROWS, make, values, window
from tiphys.dataio.episode import DataError
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.tokens.batch import ACTION, CONTINUOUS, RETURN, TokenBatch
from tiphys.pretrain.tokens.paradigms import PARADIGMS

STEPS = 6


def policy_of(paradigm="unimask", **options):
    objectives = make([ARM], paradigm, context=60, window=STEPS, **options)
    return Policy(model(objectives), Processor.from_dict(objectives.processor()))


def observations(n, seed=0):
    rows = values(ARM.field("observation"), n, np.random.default_rng(seed))
    return [{"observation": row} for row in rows]


def layouts_of(policy, query, count, goal=None):
    """The batch at each of `count` steps of one environment."""
    history = policy.processor.history("arm", query=query, goal=goal)
    out = []
    for number, observation in enumerate(observations(count)):
        acting = history.observe([observation], [1.0] if number else [0.0])
        out.append(acting)
        history.acted({"action": np.zeros((1, 2), np.float32)})
    return out


@pytest.mark.parametrize("query", ["bc", "rc", "goal"])
def test_a_query_shows_the_past_and_what_it_says(query):
    policy = policy_of()
    goal = observations(1, seed=9)[0] if query == "goal" else None
    mask = policy.processor.vocabulary.mask
    for now, acting in enumerate(layouts_of(policy, query, STEPS, goal)):
        batch = acting.batch
        shown = (batch.tokens[0] != mask) & (batch.segment[0] > 0)
        step, modality = batch.timestep[0], batch.modality[0]
        assert set(step.tolist()) == set(range(STEPS))
        assert (~batch.causal[0]).all()
        assert set(step[shown & (modality == CONTINUOUS)]) == {*range(now + 1), *([STEPS - 1] if goal else [])}
        assert set(step[shown & (modality == ACTION)]) == set(range(now))
        assert set(step[shown & (modality == RETURN)]) == ({0} if query == "rc" else set())
        here = np.flatnonzero((modality == ACTION) & (step == now))
        assert acting.open[0] == here[0]
        assert len(here) == len(acting.slots) == 2


def test_a_full_window_drops_its_older_half_and_keeps_a_future():
    policy = policy_of()
    for now, acting in enumerate(layouts_of(policy, "bc", 3 * STEPS)):
        steps = acting.batch.timestep[0]
        assert steps.max() - steps.min() == STEPS - 1
        assert steps.min() <= now <= steps.max()
        assert (now < STEPS) == (steps.min() == 0)


def test_the_answer_depends_on_the_goal_and_on_nothing_that_is_hidden():
    policy = policy_of()
    one, other = observations(2, seed=9)
    first = observations(1)[0]

    def logits(goal):
        policy.reset("arm", query="goal", goal=goal)
        found = []
        policy._choose = lambda acting, number, hidden, chosen: (
            found.append(hidden) or np.array([acting.slots[number].low])
        )
        policy.act(first)
        return found[0].numpy()

    assert not np.allclose(logits(one), logits(other))
    del policy._choose
    # The placeholders of the hidden future repeat the last observation; their values must not matter
    history = policy.processor.history("arm", query="bc")
    acting = history.observe([first])
    hidden = acting.batch.tokens[0] == policy.processor.vocabulary.mask
    assert hidden.sum() == STEPS * 8 - 5
    assert not any(hidden[e.index].any() for e in acting.batch.embedded.values())


def test_environments_act_together_and_alone_alike():
    policy = policy_of()
    some = observations(3)
    policy.reset("arm", 3, query="rc", target_return=[0.0, 2.0, 3.0])
    together = [policy.act(some, [0.0] * 3), policy.act(observations(3, seed=1), [1.0] * 3)]
    for i, target in enumerate((0.0, 2.0, 3.0)):
        policy.reset("arm", query="rc", target_return=target)
        assert np.array_equal(policy.act(some[i]), together[0][i])
        assert np.array_equal(policy.act(observations(3, seed=1)[i], 1.0), together[1][i])


def test_what_cannot_be_asked_is_refused():
    policy = policy_of(options={"hiding": {"bc": 1.0, "rc": 0.0}})
    with pytest.raises(DataError, match="not trained for the query 'rc', but for bc"):
        policy.reset("arm", query="rc")
    with pytest.raises(DataError, match="no query is called 'past'"):
        policy.reset("arm", query="past")
    policy = policy_of()
    with pytest.raises(DataError, match="'goal' needs a goal"):
        policy.reset("arm", query="goal")
    with pytest.raises(DataError, match="'bc' takes no goal"):
        policy.reset("arm", query="bc", goal=observations(1)[0])
    policy.reset("arm", goal={"picture": np.zeros(3)})
    with pytest.raises(DataError, match="the goal has no field 'observation'"):
        policy.act(observations(1)[0])
    with pytest.raises(DataError, match="it takes no query"):
        policy_of("bc").reset("arm", query="bc")
    with pytest.raises(DataError, match="tiphys label"):
        policy_of("idm").reset("arm")


def test_a_published_policy_keeps_its_query():
    policy = policy_of(options={"query": "rc"})
    again = Processor.from_dict(policy.processor.to_dict())
    assert again.history("arm").query == "rc"
    with pytest.raises(DataError, match="would not be trained"):
        policy_of(options={"query": "rc", "hiding": {"bc": 1}})


def test_a_prefix_is_seen_by_a_policy_as_in_training(monkeypatch):
    """With several answers to an action, each of which sees those before it."""
    monkeypatch.setitem(PARADIGMS, "turned", ROWS["turned"])
    objectives, rng = make([ARM], "turned", context=80, window=STEPS), np.random.default_rng(3)
    policy = Policy(model(objectives), Processor.from_dict(objectives.processor()))
    demonstration = window(objectives, "arm", 2, rng, prompt=True)
    policy.reset("arm", prompt=demonstration, target_return=3.0)
    seen, actions = observations(3), []
    for now, observation in enumerate(seen):
        actions.append(policy.act(observation, 0.0))
        # The window of training, with the actions that were chosen: each is the most probable, given those before it
        count = now + 1
        whole = replace(
            window(objectives, "arm", count, rng, start=0),
            fields={"observation": np.stack([o["observation"] for o in seen[:count]]), "action": np.stack(actions)},
            returns_to_go=np.full(count, 3.0, np.float32),
        )
        batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [[demonstration, whole]], seed=0))
        assert (~batch.causal[batch.segment > 0]).sum() == 4
        inputs = to_tensors(batch)
        with torch.no_grad():
            hidden = unpack(policy.model(inputs).hidden, inputs, 1, batch.length)[0]
        last = np.flatnonzero(batch.target[0] >= 0)[-2:]
        for place, slot in zip(last, policy.history.slots, strict=True):
            logits = policy.model.logits(hidden[[place]])[0, slot.low : slot.high]
            assert int(logits.argmax()) + slot.low == batch.target[0, place]
