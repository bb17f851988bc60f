"""Policy: its actions equal those of the obvious slow way, whatever other environments are in the batch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import tests.pretrain.token_fixtures as fixtures
from tiphys.dataio.episode import DataError
from tiphys.dataio.observation import observation_fields
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.sections.model import Experts, Model


def policy_of(objectives: Objectives, seed: int = 0, **options: Any) -> Policy:
    """A policy with random weights. Its processor is written as JSON and read again, as that of a published policy is."""
    import json

    model = Model(layers=2, hidden=32, heads=4, kv_heads=2, moe=Experts(experts=4, experts_per_token=2))
    made = DecisionModel(DecisionConfig.from_recipe(model, objectives.vocabulary), seed=seed)
    return Policy(made, Processor.from_dict(json.loads(json.dumps(objectives.processor()))), **options)


def observation(task: str, rng: np.random.Generator) -> Any:
    """A native observation, as the environment gives it."""
    if task == "grid":
        return {
            "image": rng.integers(0, 11, (7, 7, 3)).astype(np.uint8),
            "direction": int(rng.integers(4)),
            "mission": fixtures.TEXTS[int(rng.integers(len(fixtures.TEXTS)))],
        }
    return rng.normal(size=5)


def slowly(policy: Policy, history: Any, seen: Any, reward: float | None) -> Any:
    """The action of one environment: each slot by a forward pass over the whole history, without a cache."""
    acting = history.observe([observation_fields(seen)], None if reward is None else [reward])
    answers = []
    for number, slot in enumerate(acting.slots):
        inputs = to_tensors(acting.batch)
        with torch.no_grad():
            hidden = unpack(policy.model(inputs).hidden, inputs, 1, acting.batch.length)[0, acting.open[0] + number - 1]
            if slot.head:
                found = policy.model.regress(hidden[None], slot.head).numpy()
            else:
                found = policy.model.logits(hidden[None])[:, slot.low : slot.high].argmax(-1).numpy() + slot.low
        acting.answer(number, found)
        answers.append(found)
    fields = history.decode(answers)
    history.acted(fields)
    return fields["action"][0]


@pytest.mark.parametrize("task", ["grid", "arm"])
@pytest.mark.parametrize(("paradigm", "scheme"), [("bc", "compact"), ("gato", "gato"), ("dt", "compact")])
def test_a_batch_with_a_cache_acts_like_one_environment_without_a_cache(task, paradigm, scheme):
    objectives = fixtures.make(
        [fixtures.GRID, fixtures.ARM], paradigm, context=400 if scheme == "gato" else 60, scheme=scheme
    )
    policy, rng = policy_of(objectives, seed=3), np.random.default_rng(0)
    policy.reset(task, environments=3)
    slow = [policy.processor.history(task) for _ in range(3)]
    missions = [observation(task, rng) for _ in range(3)]
    for step in range(5):
        seen = [observation(task, rng) for _ in range(3)]
        if task == "grid":  # an instruction stays the same in an episode
            seen = [{**s, "mission": m["mission"]} for s, m in zip(seen, missions, strict=True)]
        rewards = None if step == 0 else [0.5, 0.0, -1.0]
        actions = policy.act(seen, rewards)
        for i in range(3):
            expected = slowly(policy, slow[i], seen[i], None if rewards is None else rewards[i])
            np.testing.assert_allclose(actions[i], expected, rtol=1e-3, atol=1e-4)


def test_actions_are_native():
    policy = policy_of(fixtures.make([fixtures.GRID, fixtures.ARM, fixtures.CAMERA], "bc", scheme="compact"))
    rng = np.random.default_rng(0)
    policy.reset("grid")
    action = policy.act(observation("grid", rng))
    assert isinstance(action, int)
    assert 0 <= action < 7
    policy.reset("arm")
    action = policy.act(observation("arm", rng))
    assert action.dtype == np.float32
    assert action.shape == (2,)
    assert -2 <= action[0] <= 2
    assert 0 <= action[1] <= 10
    policy.reset("camera")
    seen = {"front": np.zeros((20, 32, 3), np.uint8), "joints": np.zeros(2), "gripper": np.array([1, 2])}
    action = policy.act({**seen, "goal": np.zeros(2), "said": "go"})
    assert set(action) == {"arm", "hand"}
    assert action["arm"].shape == (2,)
    assert action["hand"] in (0, 1)


def test_environments_are_independent():
    """The actions in one environment do not depend on when others start, end or are left out."""
    objectives = fixtures.make([fixtures.GRID, fixtures.ARM], "bc", context=40, scheme="compact")
    policy, rng = policy_of(objectives, seed=1), np.random.default_rng(5)
    seen = [rng.normal(size=5) for _ in range(8)]
    policy.reset("arm")
    alone = [policy.act(s) for s in seen]
    policy.reset("arm", environments=3)
    policy.act([rng.normal(size=5) for _ in range(3)])
    policy.act([rng.normal(size=5)], environments=[2])
    policy.restart(1)
    together = []
    for t, s in enumerate(seen):
        if t % 2:
            together.append(policy.act([s, rng.normal(size=5)], environments=[1, 2])[0])
        else:
            together.append(policy.act([s], environments=[1])[0])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)


def test_the_target_return_changes_the_action_and_falls_with_rewards():
    policy = policy_of(fixtures.make([fixtures.ARM], "dt", context=40, scheme="compact"), seed=2)
    seen = np.zeros(5)
    policy.reset("arm", target_return=40.0)
    much = [policy.act(seen), policy.act(seen, rewards=37.0)]
    policy.reset("arm", target_return=3.0)
    little = policy.act(seen)
    assert not np.allclose(much[0], little)
    assert policy.history.target_return == [3.0]
    policy.reset("arm", target_return=40.0)
    policy.act(seen)
    assert not np.allclose(policy.act(seen, rewards=0.0), much[1])


def test_draws_depend_on_seed_stream_and_step_alone():
    objectives = fixtures.make([fixtures.GRID], "bc", scheme="compact")
    rng = np.random.default_rng(0)
    seen = [observation("grid", rng) for _ in range(30)]
    policy = policy_of(objectives, sample=True, seed=4)

    def draws(stream: int, others: int) -> list[int]:
        policy.reset("grid", environments=1 + others)
        policy.restart(others, stream=stream)
        return [policy.act([*seen[:others], s])[others] for s in seen]

    first = draws(7, 0)
    assert first == draws(7, 2)
    assert first != draws(8, 0)
    greedy = policy_of(objectives)
    greedy.reset("grid")
    assert first != [greedy.act(s) for s in seen]


def test_draws_have_the_distribution_of_the_model():
    """Within 4σ, over 3,000 draws of one slot."""
    policy = policy_of(fixtures.make([fixtures.GRID], "bc", scheme="compact"), sample=True)
    seen = observation("grid", np.random.default_rng(1))
    policy.reset("grid", environments=3000)
    counts = np.bincount(policy.act([seen] * 3000), minlength=7)
    acting = policy.processor.history("grid").observe([observation_fields(seen)])
    inputs = to_tensors(acting.batch)
    with torch.no_grad():
        hidden = unpack(policy.model(inputs).hidden, inputs, 1, acting.batch.length)[0, acting.open[0] - 1]
        slot = acting.slots[0]
        chance = policy.model.logits(hidden[None])[0, slot.low : slot.high].softmax(-1).numpy()
    assert np.all(np.abs(counts - 3000 * chance) <= 4 * np.sqrt(3000 * chance * (1 - chance)) + 1)


def test_misuse_is_refused_with_what_to_do():
    policy = policy_of(fixtures.make([fixtures.GRID], "bc", scheme="compact"))
    with pytest.raises(ValueError, match="reset"):
        policy.act({})
    with pytest.raises(KeyError, match=r"nowhere.*grid"):
        policy.reset("nowhere")
    with pytest.raises(KeyError, match="'grid' was not trained with objective 'dt', but with it"):
        policy.reset("grid", objective="dt")
    policy.reset("grid")
    with pytest.raises(ValueError, match=r"mission|direction|image"):
        policy.act({"image": np.zeros((7, 7, 3), np.uint8)})
    policy.reset("grid", environments=2)
    with pytest.raises(ValueError, match="a list of 1 observation for 2 environments"):
        policy.act([{}])
    assert policy.tasks == ("grid",)


def test_a_policy_that_asks_for_a_return_says_once_that_it_gets_no_rewards():
    objectives, rng = fixtures.make([fixtures.ARM], "dt", context=60), np.random.default_rng(0)
    policy = policy_of(objectives)
    policy.reset("arm", target_return=3.0)
    policy.act(observation("arm", rng))
    with pytest.warns(UserWarning, match="`act` was given no `rewards`"):
        policy.act(observation("arm", rng))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.act(observation("arm", rng))  # it was said
        policy.reset("arm", target_return=3.0)
        policy.act(observation("arm", rng))
        policy.act(observation("arm", rng), rewards=1.0)


@pytest.mark.parametrize("sample", [False, True])
def test_a_refused_observation_changes_no_environment(sample):
    policy, sound = (policy_of(fixtures.make([fixtures.GRID], "dt", context=400), sample=sample) for _ in range(2))
    rng = np.random.default_rng(1)
    for one in (policy, sound):
        one.reset("grid", 2)
    for step in range(12):  # across a hop
        seen, rewards = [observation("grid", rng) for _ in range(2)], [0.25, 0.5]
        if step % 3 == 2:
            for bad in (seen[1] | {"direction": 9}, {"image": seen[1]["image"]}):
                with pytest.raises(DataError):
                    policy.act([seen[0], bad], rewards)
        assert policy.act(seen, rewards) == sound.act(seen, rewards)
    states = [policy.history._episodes[i] for i in range(2)], [sound.history._episodes[i] for i in range(2)]
    assert [(e.returns, e.rewards, e.number) for e in states[0]] == [
        (e.returns, e.rewards, e.number) for e in states[1]
    ]
