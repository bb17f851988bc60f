"""Beam search for the plan with the highest expected return (Janner et al. 2021, sec. 3.2 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.branches import Branches
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.timestep import Element, TimestepLayout

if TYPE_CHECKING:
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.acting.slots import Acting


class Beam:
    """Plans of several environments, searched together. All plans of an environment share the tokens of its history.

    A plan's step: actions are drawn, `expand` for each plan, from the distribution without its least probable values, which
    together hold the share `cdf`. Branches with the same actions draw evenly from it (stratified), so few plans miss no likely
    action. The model then says the reward and the value (the discounted sum of later rewards), of which
    the expected values count, and the next observation, whose most probable ids are taken. The `width` plans with the highest
    Σ γⁱ r + γᵗ⁺¹ V stay; of plans with the same actions only one, as long as there are others. A plan whose most probable next
    token is the end of the episode earns nothing more. An action that cannot be taken now begins no plan; which can be taken
    later is not known.

    Parameters
    ----------
    policy : Policy
        The policy that acts.
    acting : Acting
        The histories of R environments.
    chosen : list of int
        Their numbers.
    options : mapping
        horizon, width, expand, cdf.
    """

    def __init__(self, policy: Policy, acting: Acting, chosen: list[int], options: Mapping[str, float]) -> None:
        self.policy, self.acting, self.chosen = policy, acting, chosen
        self.horizon, self.width, self.expand = (int(options[name]) for name in ("horizon", "width", "expand"))
        self.cdf = options["cdf"]
        self.layout = policy.history.layout
        self.parts = plan_parts(self.layout)
        choices = [pair for e in self.layout.elements for pair in e.codec.choices()]  # type: ignore[union-attr]
        for slot, column in zip(acting.slots, self.parts["action"], strict=True):
            choices[column] = (slot.low, slot.high)  # what the environment takes
        self.choices = choices
        self.gamma = float(self.layout.elements[-1].rule.partition(":")[2])
        vocabulary = policy.processor.vocabulary
        self.mask = vocabulary.mask
        self.end = vocabulary.special("end") if policy.history.predicts_end else -1
        # Position in the window and number in the episode of what comes next, for each environment
        self.position = acting.past + acting.open - acting.start
        self.number = acting.batch.timestep[np.arange(len(chosen)), acting.open]

    def search(self) -> list[np.ndarray]:
        """The ids of the best first action, for each of its slots [R]."""
        rows, recall = np.array(self.chosen), self.policy.recall
        everyone = np.arange(len(rows))
        start = recall.begin(self.acting, rows)
        hidden = recall.read(self.acting.batch.part(everyone, start, self.acting.open), rows)
        recall.end(self.acting, rows)
        each = self.width * self.expand
        self.branches = Branches(recall.cache, rows, each, self.horizon * self.layout.width)
        hidden = hidden.repeat_interleave(each, 0)
        first = np.zeros((len(hidden), len(self.parts["action"])), np.int64)
        earned, alive = np.zeros(len(hidden)), np.ones(len(hidden), bool)
        plan = np.repeat(everyone, each)  # a number for each sequence of actions
        for step in range(self.horizon):
            if step:
                again = np.repeat(np.arange(len(hidden)), self.expand)
                self.branches.select(again)
                hidden = hidden[torch.from_numpy(again).to(hidden.device)]
                first, earned, alive, plan = first[again], earned[again], alive[again], plan[again]
            for slot, column in enumerate(self.parts["action"]):
                ids = self._drawn(hidden, column, step, slot, plan)
                plan = np.unique(np.stack([plan, ids]), axis=1, return_inverse=True)[1].reshape(-1)
                first[:, slot] = ids if step == 0 else first[:, slot]
                hidden = self._read(ids[:, None], [column], step)[:, -1]
            reward, said = self._expected(hidden, self.parts["reward"][0])
            value_column = self.parts["return"][0]
            two = self._read(
                np.stack([said, np.full_like(said, self.mask)], 1), [self.parts["reward"][0], value_column], step
            )
            value, _ = self._expected(two[:, 0], value_column)
            hidden = two[:, 1]
            earned = earned + alive * self.gamma**step * reward
            score = earned + alive * self.gamma ** (step + 1) * value
            kept = self._best(score, self.width, plan)
            self.branches.select(kept)
            hidden = hidden[torch.from_numpy(kept).to(hidden.device)]
            first, earned, alive, score, plan = first[kept], earned[kept], alive[kept], score[kept], plan[kept]
            if step + 1 < self.horizon:
                hidden, ended = self._observed(hidden, step + 1)
                alive = alive & ~ended
        best = first[self._best(score, 1, plan)]
        return [best[:, slot] for slot in range(best.shape[1])]

    def _observed(self, hidden: torch.Tensor, step: int) -> tuple[torch.Tensor, np.ndarray]:
        """Reads the most probable next observation: the hidden states after it, and bool [n], whether the episode ends."""
        ended = np.zeros(len(hidden), bool)
        for column in self.parts["observation"]:
            low, high = self.choices[column]
            logits = self.policy.model.logits(hidden)
            best = logits[:, low:high].max(-1)
            if column == 0 and self.end >= 0:
                ended = (logits[:, self.end] > best.values).cpu().numpy()
            hidden = self._read(best.indices.cpu().numpy()[:, None] + low, [column], step)[:, -1]
        return hidden, ended

    def _drawn(self, hidden: torch.Tensor, column: int, step: int, slot: int, plan: np.ndarray) -> np.ndarray:
        """Ids [n] of an action, drawn among the more probable ones. Branches of one plan share its distribution evenly."""
        low, high = self.choices[column]
        logits = self.policy.model.logits(hidden)[:, low:high].cpu().double()
        each = len(logits) // len(self.chosen)
        if step == 0 and slot in self.acting.allowed:
            can = np.repeat(self.acting.allowed[slot], each, axis=0)
            logits = logits.masked_fill(~torch.from_numpy(can), float("-inf"))
        chance, order = logits.softmax(-1).sort(-1)
        dropped = chance.cumsum(-1) < self.cdf
        dropped[:, -1] = False  # the most probable one
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), float("-inf"))
        attempt = 1 + step * self.width * self.expand + np.arange(each)
        uniform = self.policy.uniform(self.chosen, slot, attempt).reshape(-1)
        copy, copies = numbered(plan)
        return drawn(logits, (copy + uniform) / copies) + low

    def _expected(self, hidden: torch.Tensor, column: int) -> tuple[np.ndarray, np.ndarray]:
        """The expected value [n] of what stands in a column, and its most probable ids [n]."""
        low, high = self.choices[column]
        chance = self.policy.model.logits(hidden)[:, low:high].cpu().double().softmax(-1)
        values = values_of(self.layout.elements[self._element(column)])
        return chance.numpy() @ values, chance.argmax(-1).numpy() + low

    def _element(self, column: int) -> int:
        return int(np.searchsorted(self.layout.columns, column, side="right")) - 1

    def _best(self, score: np.ndarray, count: int, plan: np.ndarray) -> np.ndarray:
        """The branches with the highest scores, `count` of each environment. All plans stay equally often, if there are few.

        Values are estimates, so the best plan so far need not be the one that earns most in the end.
        """
        each = len(score) // len(self.chosen)
        owner = np.arange(len(score)) // each
        order = np.lexsort((-score, numbered(plan)[0], owner)).reshape(-1, each)
        return order[:, : min(count, each)].reshape(-1)

    def _read(self, ids: np.ndarray, columns: list[int], step: int) -> torch.Tensor:
        """The hidden states [n, k, D] of new tokens [n, k] of all branches, which stand in these columns of a plan's step."""
        n, k = ids.shape
        each = n // len(self.chosen)
        batch = TokenBatch.empty(0, k, n)
        position = np.repeat(self.position, each) + self.branches.length
        ones = np.ones((n, 1), np.int32)
        dense = {
            "row": np.arange(n),
            "tokens": ids.astype(np.int32),
            "segment": np.ones((n, k), np.int32),
            "modality": np.broadcast_to(self.layout.modality[columns], (n, k)).copy(),
            "position": (position[:, None] + np.arange(k)).astype(np.int32),
            "local": ones * self.layout.local[columns],
            "timestep": ones * (np.repeat(self.number, each)[:, None] + np.int32(step)),
            "task": np.full((n, k), self.layout.number, np.int32),
            "causal": np.ones((n, k), bool),
        }
        for name, array in dense.items():
            getattr(batch, name)[...] = array
        model, recall = self.policy.model, self.policy.recall
        hidden = model(to_tensors(batch, model.device), cache=self.branches).hidden.view(n, k, -1)  # type: ignore[arg-type]
        self.branches.grow(k)
        recall.tokens += n * k
        return hidden


def plan_parts(layout: TimestepLayout) -> dict[str, list[int]]:
    """The columns of a timestep by role: observation, action, reward, return.

    Raises
    ------
    DataError
        If a timestep is not observations, actions, a reward and a return that is hidden, all predicted as ids.
    """
    columns: dict[str, list[int]] = {"observation": [], "action": [], "reward": [], "return": []}
    order = [e.role for e in layout.elements]
    for element, first in zip(layout.elements, layout.columns, strict=True):
        if element.role in columns:
            columns[element.role] += range(first, first + element.size)
    fits = order == sorted(order, key=list(columns).index) if set(order) == set(columns) else False
    single = len(columns["reward"]) == 1 and len(columns["return"]) == 1 and not layout.elements[-1].shown
    plain = all(e.predicted and not e.head for e in layout.elements) and not layout.varies
    if not (fits and single and plain and layout.elements[-1].rule.startswith("discounted:")):
        raise DataError(
            f"task {layout.task!r}: a plan needs steps of observations, actions, one reward and one hidden discounted return, "
            f"all of them predicted as ids at every step; this objective has {', '.join(map(_named, layout.elements))}"
        )
    return columns


def _named(element: Element) -> str:
    return element.field or element.role


def values_of(element: Element) -> np.ndarray:
    """float64 [ids]: the numbers that the ids of an element of one position stand for."""
    codec = element.codec
    assert codec is not None
    ((low, high),) = codec.choices()
    return np.asarray(codec.decode(np.arange(low, high)[:, None]), np.float64).reshape(-1)


def numbered(plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number [n] of each branch among those of its plan, and how many [n] these are."""
    order = np.argsort(plan, kind="stable")
    first = np.searchsorted(plan[order], plan[order])
    copy = np.empty(len(plan), np.int64)
    copy[order] = np.arange(len(plan)) - first
    return copy, np.bincount(plan)[plan]


def drawn(logits: torch.Tensor, uniform: np.ndarray) -> np.ndarray:
    """Indices [n] drawn from the softmax of logits [n, m] by uniform numbers [n]. One whose logit is −∞ is never drawn."""
    below = logits.double().softmax(-1).cumsum(-1)
    last = (
        logits.shape[1] - 1 - logits.isneginf().flip(-1).int().argmin(-1)
    )  # the cumulated sum may round to less than 1
    return (below < torch.from_numpy(uniform)[:, None]).sum(-1).minimum(last).numpy()
