"""A policy that remembers what it has read answers like one that reads the same windows anew at every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.acting.test_policy import policy_of
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.tokens import paradigms
from tiphys.pretrain.tokens.paradigm import Paradigm, Part
from tiphys.recipes.sections.objective import FieldTokens

SHORT = {"text_tokens": 6}
SETUPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gato": ("gato", "camera", {"context": 150, "scheme": "gato", "options": SHORT}),
    "bc grid": ("bc", "grid", {"context": 30, "options": SHORT}),
    "bc two regressed": ("bc", "camera", {"context": 70, "discretise": "no", "options": SHORT}),
    "bc strided": ("bc", "camera", {"context": 90, "fields": {"*.front": FieldTokens(stride=3)}, "options": SHORT}),
    "bc chunked": ("bc", "arm", {"context": 34, "fields": {"action": FieldTokens(chunk=3)}}),
    "bc one step": ("bc", "arm", {"context": 34, "window": 1}),
    "bc two steps": ("bc", "grid", {"context": 60, "window": 2}),
    "dt": ("dt", "arm", {"context": 21}),
    # Grids are embedded in view of words that may be longer ago than what is laid out
    "bc told": ("bc", "told", {"context": 60, "options": SHORT}),
    "bc told at times": (
        "bc",
        "told",
        {"context": 60, "fields": {"*.mission": FieldTokens(stride=4)}, "options": SHORT},
    ),
    "bc strided told": ("bc", "told", {"context": 60, "fields": {"*.image": FieldTokens(stride=3)}, "options": SHORT}),
}
TOLD = replace(  # told anew at each step
    fixtures.GRID,
    name="told",
    fields=tuple(replace(f, per="step") if f.role == "text" else f for f in fixtures.GRID.fields),
)
TASKS = [fixtures.GRID, fixtures.ARM, fixtures.CAMERA, TOLD]


class Recorded(Policy):
    """Keeps what the model said at each slot, and what was answered: (environment, slot) -> a vector, of the last step."""

    def _choose(
        self, acting: Any, number: int, hidden: torch.Tensor, environments: list[int], *tilt: Any
    ) -> np.ndarray:
        slot = acting.slots[number]
        said = self.model.regress(hidden, slot.head) if slot.head else self.model.logits(hidden)
        found = super()._choose(acting, number, hidden, environments, *tilt)
        self.said = getattr(self, "said", {}) | {(e, number): s for e, s in zip(environments, said, strict=True)}
        self.found = getattr(self, "found", {}) | {(e, number): f for e, f in zip(environments, found, strict=True)}
        return found


def recorded(of: Any, **options: Any) -> Recorded:
    plain = policy_of(of, seed=3)
    return Recorded(plain.model, plain.processor, **options)


def native(task: str, fields: dict[str, Any], t: int) -> dict[str, Any]:
    """The observation of a step of a window, by the names of its fields."""
    spec = next(s for s in TASKS if s.name == task)
    return {
        f.name: fields[f.name] if f.per == "episode" else fields[f.name][t]
        for f in spec.fields
        if f.role in ("observation", "text")
    }


def anew(policy: Recorded, history: Any, seen: Any, reward: float, i: int) -> list[torch.Tensor]:
    """What the model says at each slot, from one forward pass over the whole window of environment i with its answers."""
    acting = history.observe([seen], [reward])
    for number in range(len(acting.slots)):
        acting.answer(number, np.asarray(policy.found[i, number])[None])
    taken = policy.history._episodes[i].actions[-1]
    fields = {e.field: np.asarray(taken[e.field])[None] for e in history.actions}
    fields["return"] = np.array([policy.history._episodes[i].returns[-1]])
    inputs = to_tensors(acting.batch)
    with torch.no_grad():
        hidden = unpack(policy.model(inputs).hidden, inputs, 1, acting.batch.length)[0]
        said = [hidden[acting.open[0] + i - 1][None] for i in range(len(acting.slots))]
        heads = [slot.head for slot in acting.slots]
        out = [
            policy.model.regress(h, name) if name else policy.model.logits(h)
            for h, name in zip(said, heads, strict=True)
        ]
    history.acted(fields)
    return [o[0] for o in out]


def play(policy: Recorded, task: str, steps: int, rng: np.random.Generator, prompt: Any = None) -> float:
    """Plays with random resets, absences and changes of what stays the same. Returns the largest difference of a logit."""
    environments, worst = 3, 0.0
    policy.reset(task, environments, prompt=prompt)
    histories = [policy.processor.history(task, prompt=prompt, hop=policy.hop) for _ in range(environments)]
    source = fixtures.make(TASKS, "bc")
    episodes = [fixtures.window(source, task, steps, rng, start=0).fields for _ in range(environments)]
    fresh = [True] * environments
    for t in range(steps):
        present = [i for i in range(environments) if rng.random() < 0.8] or [0]
        for i in present:
            if rng.random() < 0.04:
                policy.restart(i)
                histories[i].reset(0)
                fresh[i] = True
            if rng.random() < 0.04:  # another instruction, another goal
                other = fixtures.window(source, task, steps, rng, start=0).fields
                episodes[i] = {n: v if np.ndim(v) == 0 or len(v) != steps else episodes[i][n] for n, v in other.items()}
        seen = [native(task, episodes[i], t) for i in present]
        rewards = [0.0 if fresh[i] else float(rng.normal()) for i in present]
        policy.act(seen, rewards, present)
        for i, observation, reward in zip(present, seen, rewards, strict=True):
            said = anew(policy, histories[i], observation, reward, i)
            worst = max(worst, *(float((policy.said[i, n] - s).abs().max()) for n, s in enumerate(said)))
            fresh[i] = False
    return worst


def made(setup: str, **more: Any) -> tuple[Any, str]:
    paradigm, task, options = SETUPS[setup]
    of = fixtures.make([t for t in TASKS if t.name == task], paradigm, **({"scheme": "compact"} | options | more))
    return of, task


@pytest.mark.parametrize("setup", SETUPS)
def test_what_is_remembered_changes_no_answer(setup):
    of, task = made(setup)
    assert play(recorded(of), task, 40, np.random.default_rng(1)) <= 1e-4


@pytest.mark.parametrize("setup", ["gato", "bc grid"])
def test_a_demonstration_is_read_once(setup):
    """By one of the environments; the others, and the windows after a hop, copy it."""
    of, task = made(setup, context=300)
    demonstration = fixtures.window(of, task, 8, np.random.default_rng(0), prompt=True)
    policy, rng = recorded(of), np.random.default_rng(2)
    assert play(policy, task, 30, rng, demonstration) <= 1e-4
    policy.reset(task, 6, prompt=demonstration)
    episode = fixtures.window(of, task, 1, rng, start=0).fields
    policy.act([native(task, episode, 0)] * 6)
    beginning = policy.history._prompt_tokens
    assert policy.recall.tokens < 4 * beginning  # of six
    assert policy.recall.cache.lengths.min() > beginning > 20


def test_windows_that_always_show_the_most_are_computed_anew():
    of, task = made("dt")
    policy = recorded(of, hop=False)
    assert play(policy, task, 30, np.random.default_rng(3)) <= 1e-4
    hopping = recorded(of)
    for one in (policy, hopping):
        one.reset(task)
        rng = np.random.default_rng(4)
        for _ in range(40):
            one.act(rng.normal(size=5), 0.1)
    assert len(policy.history._episodes[0].observations) == 7
    assert 3 <= len(hopping.history._episodes[0].observations) <= 7
    assert hopping.recall.tokens <= 40 * 2 * 3 < policy.recall.tokens


def test_an_action_that_is_encoded_differently_is_read_again(monkeypatch):
    """Here a bin is decoded to the middle of its neighbour, as with bins of no width."""
    of, task = made("gato")
    policy = recorded(of)
    codec = type(next(e.codec for e in of_layout(policy, task).elements if e.field == "action.arm"))
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda self, ids: decode(self, np.maximum(ids - 1, ids.min())))
    assert play(policy, task, 12, np.random.default_rng(5)) <= 1e-4


def of_layout(policy: Policy, task: str) -> Any:
    return policy.processor.layouts[policy.processor.objective(task)][task]


def test_rewards_stand_behind_the_actions(monkeypatch):
    row = Paradigm(
        "rewarded",
        "a test",
        (Part("observation", "uniform"), Part("action", "uniform", 1.0), Part("reward", "uniform", 1.0)),
    )
    monkeypatch.setitem(paradigms.PARADIGMS, row.name, row)
    of = fixtures.make([fixtures.ARM], "rewarded", context=45)
    assert play(recorded(of), "arm", 20, np.random.default_rng(6)) <= 1e-4
