"""RULES: how a policy chooses its answers. A paradigm names its rule; `Policy.reset(task, acting={…})` changes its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tiphys.dataio.episode import DataError
from tiphys.dataio.stored import number
from tiphys.pretrain.acting.beam import Beam
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.tokens.paradigm import ACTING, ACTING_OPTIONS
from tiphys.pretrain.tokens.timestep import CAUSAL

if TYPE_CHECKING:
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.acting.slots import Acting

# (policy, histories, their environments, options) -> the answers to all slots, and how many of the slots the model has read
Answers = Callable[["Policy", "Acting", "list[int]", Mapping[str, float]], "tuple[list[np.ndarray], int]"]


def one_after_another(
    policy: Policy, acting: Acting, chosen: list[int], options: Mapping[str, float]
) -> tuple[list[np.ndarray], int]:
    """Each slot is answered in view of the slots before it. What is new is read once, then one token for each further slot."""
    rows, causal = np.array(chosen), policy.history.layout.mask == CAUSAL
    start = policy.recall.begin(acting, rows) if causal else acting.start
    answers: list[np.ndarray] = []
    for slot in range(len(acting.slots)):
        stop = acting.open + slot  # the hidden state before this column answers the slot
        if causal:
            hidden = policy.recall.read(acting.batch.part(np.arange(len(rows)), start, stop), rows)
        else:
            hidden = _whole(policy, acting)[np.arange(len(rows)), stop - 1]
        tilt = _tilt(policy, options["kappa"]) if acting.slots[slot].field == "return" else None
        answers.append(policy._choose(acting, slot, hidden, chosen, tilt))
        acting.answer(slot, answers[-1])
        start = stop
    if not causal:
        return answers, 0
    policy.recall.end(acting, rows)
    return answers, len(acting.slots) - 1


def _whole(policy: Policy, acting: Acting) -> Tensor:
    """Hidden states [R, L, D] of whole windows. What sees tokens that come after it, such as a prefix, cannot be remembered."""
    inputs = to_tensors(acting.batch, policy.model.device)
    return unpack(policy.model(inputs).hidden, inputs, acting.batch.rows, acting.batch.length)


def _tilt(policy: Policy, kappa: float) -> np.ndarray:
    """What is added to the logits of returns, so that they are drawn from P(R) · exp(κ (R − low) / (high − low)).

    (Lee et al. 2022, sec. 3.4.) low … high is the range of the data's returns; ids may be able to say much more.
    """
    values = policy.history.return_values()
    known = policy.processor.return_quantiles.get(policy.task, values)
    return kappa * values / (float(known[-1] - known[0]) or float(values.max() - values.min()))


def beam(
    policy: Policy, acting: Acting, chosen: list[int], options: Mapping[str, float]
) -> tuple[list[np.ndarray], int]:
    """The first action of the best plan that a beam search finds. The plan is made anew at every step."""
    return Beam(policy, acting, chosen, options).search(), 0


def at_once(
    policy: Policy, acting: Acting, chosen: list[int], options: Mapping[str, float]
) -> tuple[list[np.ndarray], int]:
    """All slots are hidden, and are answered where they stand. Nothing is remembered: all positions see each other."""
    rows, found = np.arange(len(chosen)), _whole(policy, acting)
    answers = [policy._choose(acting, i, found[rows, acting.open + i], chosen) for i in range(len(acting.slots))]
    return answers, 0


RULES: dict[str, Answers] = {
    "next": one_after_another,
    "ask": one_after_another,
    "match": one_after_another,
    "imitate": one_after_another,
    "sample": one_after_another,
    "fill": at_once,
    "beam": beam,
}


def resolved(rule: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, float]:
    """The options of a rule: those that are stored with an objective, or given instead.

    Raises DataError if the rule is unknown, or an option is unknown or out of range.
    """
    if rule not in ACTING:
        raise DataError(f"the policy acts by {rule!r}, which this Tiphys does not know; update Tiphys")
    mine = [name for name in stored if name in ACTING_OPTIONS]
    if unknown := sorted(set(given) - set(mine)):
        known = ", ".join(mine) or "none"
        raise DataError(f"acting by {rule!r} has no option {unknown[0]!r}; its options are {known}")
    options = {name: value for name, value in {**stored, **given}.items() if name in ACTING_OPTIONS}
    return {name: float(number(value, f"acting, {name}", *ACTING_OPTIONS[name][1:])) for name, value in options.items()}
