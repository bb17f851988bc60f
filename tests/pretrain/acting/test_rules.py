"""Rules of acting: plans by beam search, and returns that are drawn before the action."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.acting.test_policy import policy_of
from tests.pretrain.acting.test_recall import play, recorded
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.statistics import RETURN_TO_GO, Sketch
from tiphys.pretrain.acting import beam
from tiphys.pretrain.acting.beam import Beam
from tiphys.pretrain.acting.rules import RULES
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.tokens.derived import REWARD_FIELD
from tiphys.pretrain.tokens.paradigm import ACTING, Part
from tiphys.pretrain.tokens.ranges import Ranges
from tiphys.pretrain.tokens.return_codecs import return_codec, return_range

PLAN = {"horizon": 3, "width": 1, "expand": 1}


def test_every_rule_that_a_paradigm_can_name_exists():
    assert set(ACTING) - {"label", "compare"} == set(RULES)  # these two do not act


def arm(**options: Any) -> Any:
    return fixtures.make([fixtures.ARM], "tt", context=90, options=options)


def test_a_plan_is_read_like_the_history_that_it_would_become(monkeypatch):
    """The same tokens, and the same hidden states as one pass over the whole window."""
    policy, rng, read = policy_of(arm(**PLAN)), np.random.default_rng(0), []
    plain = Beam._read

    def recorded_read(self: Beam, ids: np.ndarray, columns: list[int], step: int) -> torch.Tensor:
        read.append((ids, plain(self, ids, columns, step)))
        return read[-1][1]

    monkeypatch.setattr(Beam, "_read", recorded_read)
    policy.reset("arm", 2)
    history = policy.processor.history("arm", hop=True, reserve=2)
    layout = policy.history.layout
    seen, rewards = rng.normal(size=(4, 2, 5)).astype(np.float32), rng.normal(size=(4, 2))
    for t in range(4):
        read.clear()
        policy.act(list(seen[t]), rewards[t].tolist())
        acting = history.observe([{"observation": seen[t, 1]}], [float(rewards[t, 1])])
        if t < 3:
            history.acted({"action": policy.history._episodes[1].actions[-1]["action"][None]})
    ids = np.concatenate([i[1] for i, _ in read])
    hidden = torch.cat([h[1] for _, h in read])
    steps = ids[: 2 * 9].reshape(2, 9)  # two actions, the reward, a mask, the next observation
    values = {e.role: e for e in layout.elements}
    for one in steps:
        history.acted({"action": values["action"].codec.decode(one[None, :2])})
        reward = float(values["reward"].codec.decode(one[None, 2:3])[0])
        acting = history.observe([{"observation": values["observation"].codec.decode(one[None, 4:])[0]}], [reward])
    stop = int(acting.open[0])
    start = stop - 2 * 9
    assert acting.batch.tokens[0, start:stop].tolist() == steps.ravel().tolist()
    with torch.no_grad():
        whole = policy.model(to_tensors(acting.batch.part(np.array([0]), 0, stop))).hidden
    torch.testing.assert_close(hidden[: 2 * 9], whole[start:], rtol=1e-4, atol=1e-4)


class Worlds:
    """In place of branches: the state of each plan in a world of a few states."""

    def __init__(self, *_: Any) -> None:
        self.state = np.zeros(0, int)

    def select(self, chosen: np.ndarray) -> None:
        self.state = self.state[chosen]


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_search_finds_what_dynamic_programming_finds(monkeypatch, seed):
    """In a world of 5 states and 3 actions. One of its states is the end, and plans that reach it earn nothing more."""
    rng, states, actions, horizon, gamma = np.random.default_rng(seed), 5, 3, 4, 0.9
    reward, after = rng.normal(size=(states, actions)), rng.integers(0, states, (states, actions))
    value = rng.normal(size=(states, actions))  # what a model could say of the time after
    end = states - 1

    def best(state: int, left: int) -> float:  # of the plans of `left` steps from here
        if state == end:
            return 0.0
        rest = value[state] if left == 1 else np.array([best(s, left - 1) for s in after[state]])
        return float((reward[state] + gamma * rest).max())

    class Known(Beam):
        def _drawn(self, hidden: Any, column: int, step: int, slot: int, plan: np.ndarray) -> np.ndarray:
            return np.arange(len(hidden)) % actions

        def _read(self, ids: np.ndarray, columns: list[int], step: int) -> Any:
            if columns == [1]:
                now = np.zeros(len(ids), int) + self.policy.starts[0] if step == 0 else self.branches.state
                self.branches.state = now * actions + ids[:, 0]  # state and action, until the next observation
            return torch.zeros(len(ids), len(columns), 1)

        def _expected(self, hidden: Any, column: int) -> Any:
            table = reward if column == 2 else value
            return table.reshape(-1)[self.branches.state], np.zeros(len(hidden), int)

        def _observed(self, hidden: Any, step: int) -> Any:
            self.branches.state = after.reshape(-1)[self.branches.state]
            return hidden, self.branches.state == end

    monkeypatch.setattr(beam, "Branches", Worlds)
    for start in range(states - 1):
        search = object.__new__(Known)
        recall = SimpleNamespace(begin=lambda *_: 0, read=lambda *_: torch.zeros(1, 1), end=lambda *_: None, cache=None)
        search.policy = SimpleNamespace(recall=recall, starts=[start])
        search.acting = SimpleNamespace(batch=SimpleNamespace(part=lambda *_: None), open=0)
        search.mask = 0
        search.chosen, search.layout = [0], SimpleNamespace(width=4)
        search.horizon, search.width, search.expand, search.gamma = horizon, actions**horizon, actions, gamma
        search.parts = {"observation": [0], "action": [1], "reward": [2], "return": [3]}
        ((action,),) = search.search()
        scores = reward[start] + gamma * np.array([best(s, horizon - 1) for s in after[start]])
        assert action == int(scores.argmax())


def test_branches_of_one_plan_miss_no_likely_action():
    """Of three branches one at least draws an action with a probability of more than a third, whatever the chances are."""
    rng = np.random.default_rng(0)
    plan = np.array([4, 1, 4, 0, 4, 1])
    copy, copies = beam.numbered(plan)
    assert copy.tolist() == [0, 0, 1, 0, 2, 1]
    assert copies.tolist() == [3, 2, 3, 1, 3, 2]
    logits = torch.log(torch.tensor([[0.34, 0.66]], dtype=torch.float64)).repeat(3, 1)
    taken = []
    for _ in range(200):
        taken.append(beam.drawn(logits, (np.arange(3) + rng.random(3)) / 3))
        assert set(taken[-1]) == {0, 1}
    assert np.mean(taken) == pytest.approx(0.66, abs=0.02)


def test_places_that_are_left_go_to_all_plans_alike():
    search = object.__new__(Beam)
    search.chosen = [0]
    plan, score = np.array([0, 0, 0, 0, 1, 1]), np.array([9.0, 9, 9, 9, 1, 1])
    assert plan[search._best(score, 4, plan)].tolist() == [0, 1, 0, 1]
    assert plan[search._best(score, 1, plan)].tolist() == [0]


def test_returns_are_drawn_in_favour_of_high_ones():
    of = fixtures.make([fixtures.ARM], "mgdt", context=40)
    policy, rng = policy_of(of), np.random.default_rng(0)
    means = []
    for kappa in (-20.0, 0.0, 20.0):
        policy.reset("arm", 300, acting={"kappa": kappa})
        policy.act([rng.normal(size=5) for _ in range(300)])
        means.append(np.mean([e.returns[-1] for e in policy.history._episodes]))
    assert means[0] < means[1] - 1
    assert means[1] < means[2] - 1
    assert play(recorded(of), "arm", 25, rng) <= 1e-4


@pytest.mark.parametrize("paradigm", ["bc", "mgdt", "tt", "unimask"])
def test_every_rule_acts_only_as_it_can(paradigm):
    fields = (
        FieldSpec("observation.seen", "observation", "discrete", "int64", (), values=4),
        FieldSpec("can", "mask", "discrete", "bool", (5,), values=2),
        FieldSpec("action", "action", "discrete", "int64", (), values=5),
        FieldSpec("reward", "reward", "continuous", "float32"),
    )
    of = fixtures.make([TaskSpec("room", fields)], paradigm, context=60, options={"available": "can"})
    policy, rng = policy_of(of), np.random.default_rng(0)
    policy.reset("room", 4, acting=PLAN if paradigm == "tt" else None)
    for step in range(5):
        can = rng.random((4, 5)) < 0.3
        can[:, step] = True
        seen = [{"observation.seen": i, "can": mask} for i, mask in enumerate(can)]
        assert can[np.arange(4), policy.act(seen, [0.5] * 4)].all()


@pytest.mark.parametrize(
    ("rule", "returns", "rewards", "low", "high"),
    [
        ("to_go", (2.0, 7.0), (0.0, 1.0), 2.0, 7.0),
        ("discounted:.99", (2.0, 7.0), (0.0, 1.0), 0.0, 7.0),
        ("discounted:.99", (-7.0, -2.0), (-1.0, -0.5), -7.0, 0.0),
        ("discounted:.99", (-2.0, 7.0), (-1.0, 1.0), -9.0, 9.0),
    ],
    ids=["to go", "discounted", "discounted costs", "discounted, of both signs"],
)
def test_uniform_bins_of_returns_cover_what_the_data_can_have(rule, returns, rewards, low, high):
    """A policy that prefers low returns would draw one that stands for nothing; half of the bins would be lost."""

    def found(values):
        sketch = Sketch(())
        sketch.add(np.array(values)[:, None])
        return sketch.result()

    part = Part("return", "uniform", source=rule)
    encoding = SimpleNamespace(
        statistics={RETURN_TO_GO: found(returns), REWARD_FIELD: found(rewards)},
        largest_return=7.0,
        ranges=Ranges(600, 1024, 0, 0),
        task=fixtures.ARM,
    )
    codec = return_codec(encoding, part)
    values = codec.decode(np.arange(*codec.choices()[0])[:, None])
    assert low <= values.min() < low + 0.1
    assert high - 0.1 < values.max() <= high


@pytest.mark.parametrize("discount", [0.0, 0.9, 0.99, 1.0])
def test_no_discounted_return_lies_outside_its_bins(discount):
    rng, part = np.random.default_rng(4), Part("return", "uniform", source=f"discounted:{discount}")
    for _ in range(50):
        rewards = rng.normal(size=30) * rng.choice([0.1, 3.0], 30) * (rng.random(30) < rng.random())
        to_go = rewards[::-1].cumsum()[::-1]
        given = ((RETURN_TO_GO, to_go), (REWARD_FIELD, rewards))
        statistics = {name: SimpleNamespace(count=30, min=v.min(), max=v.max()) for name, v in given}
        low, high = return_range(SimpleNamespace(statistics=statistics), part, abs(to_go[0]))
        values = [rewards[t + 1 :] @ discount ** np.arange(29 - t) for t in range(30)]
        assert not rewards.any() or low - 1e-9 <= min(values) <= max(values) <= high + 1e-9


def test_draws_of_plans_do_not_depend_on_other_environments():
    policy, rng = policy_of(arm(horizon=2, width=3, expand=2)), np.random.default_rng(1)
    seen = rng.normal(size=(3, 5))
    policy.reset("arm", 1)
    alone = [policy.act(s, 0.5) for s in seen]
    policy.reset("arm", 3)
    policy.restart(2, stream=0)
    together = [policy.act([rng.normal(size=5), rng.normal(size=5), s], [0.0, 0.1, 0.5])[2] for s in seen]
    np.testing.assert_array_equal(alone, together)


def test_options_of_acting_are_checked():
    policy = policy_of(arm())
    policy.reset("arm")
    assert policy.history.reserve == 9  # ten steps fit, so a plan has at most ten
    with pytest.raises(DataError, match=r"'beam' has no option 'kappa'; its options are .*horizon"):
        policy.reset("arm", acting={"kappa": 1})
    with pytest.raises(DataError, match="plan of 11 steps is longer than the policy's window of 10"):
        policy.reset("arm", acting={"horizon": 11})
    with pytest.raises(DataError, match="width"):
        policy.reset("arm", acting={"width": 0})
    with pytest.raises(DataError, match="takes no target return"):
        policy.reset("arm", target_return=3.0)
    with pytest.raises(DataError, match=r"objectives\.it\.options\.kappa: paradigm 'tt' acts by 'beam'"):
        arm(kappa=3.0)
    with pytest.raises(DataError, match=r"objectives\.it\.options\.width"):
        arm(width=0)
