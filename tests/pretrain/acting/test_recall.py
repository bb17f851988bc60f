"""A policy that remembers what it has read answers like one that reads the same windows anew at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.acting.test_policy import policy_of
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.recipes.schema import FieldTokens

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
}
TASKS = [fixtures.GRID, fixtures.ARM, fixtures.CAMERA]


class Recorded(Policy):
    """Keeps what the model said at each slot: (environment, slot) -> logits or a vector, of the last step."""

    def _choose(self, acting: Any, number: int, hidden: torch.Tensor, environments: list[int]) -> np.ndarray:
        slot = acting.slots[number]
        said = self.model.regress(hidden, slot.head) if slot.head else self.model.logits(hidden)
        self.said = getattr(self, "said", {}) | {(e, number): s for e, s in zip(environments, said, strict=True)}
        return super()._choose(acting, number, hidden, environments)


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


def anew(policy: Policy, history: Any, seen: Any, reward: float | None, taken: Any) -> list[torch.Tensor]:
    """What the model says at each slot, from one forward pass over the whole window with the actions that were taken."""
    acting = history.observe([seen], None if reward is None else [reward])
    fields = {e.field: np.asarray(taken[e.field])[None] for e in history.actions}
    encoded = [column for e in history.actions for column in np.moveaxis(e.codec.encode(fields[e.field]), 1, 0)]
    for number, value in enumerate(encoded):
        acting.answer(number, value)
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
    environments, worst = 4, 0.0
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
        actions = policy.act(seen, rewards, present)
        for i, observation, reward, _action in zip(present, seen, rewards, actions, strict=True):
            taken = policy.history._episodes[i].actions[-1]
            said = anew(policy, histories[i], observation, reward, taken)
            worst = max(worst, *(float((policy.said[i, n] - s).abs().max()) for n, s in enumerate(said)))
            fresh[i] = False
    return worst


@pytest.mark.parametrize("setup", SETUPS)
def test_what_is_remembered_changes_no_answer(setup):
    paradigm, task, options = SETUPS[setup]
    of = fixtures.make([t for t in TASKS if t.name == task], paradigm, **({"scheme": "compact"} | options))
    assert play(recorded(of), task, 60, np.random.default_rng(1)) <= 1e-4
