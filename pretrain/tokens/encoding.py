"""Encoding: everything that decides how the fields of one task become tokens under one objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.tokens.agent_statistics import statistics_of_one_agent
from tiphys.pretrain.tokens.agents import agent_fields, of_one_agent
from tiphys.pretrain.tokens.frames import Frame
from tiphys.pretrain.tokens.paradigm import ACTING_OPTIONS, Paradigm, Part
from tiphys.pretrain.tokens.ranges import Ranges

if TYPE_CHECKING:
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.recipes.sections.objective import FieldTokens, Objective

OPTIONS = {
    "without_rewards": "true: allow an objective that is conditioned on returns for tasks whose data have no rewards",
    "hiding": "schemes by which parts of a window are hidden, with their shares",
    "query": "what a policy that fills in hidden parts is asked: bc, rc or goal",
    "agents": "number of agents, whose values are the first axis of actions and observations; for a paradigm of several agents",
    "available": "field that tells which values of a discrete action can be taken; for several agents: that with the role mask",
    "swap": "for a paradigm that learns which texts fit: share of the windows that show the text of another window",
    "text_tokens": "most tokens of a text; of a document: of a window of it",
    "allow_clipped": "share of an action field's values that may be clamped",
    "histogram": "field of whose future values histograms are shown (gdt)",
    "action_quantile": "for an action field without bounds: its range goes from this quantile q to 1 − q; 0: from min to max",
} | {name: meaning for name, (meaning, _, _) in ACTING_OPTIONS.items()}
# (action field, its frame, horizon) -> statistics of the relative actions
Framed = Callable[[FieldSpec, Frame, int], "FieldStatistics"]
# discount -> statistics of the sums of the rewards after each step
Discounted = Callable[[float], "FieldStatistics"]


@dataclass(frozen=True)
class Encoding:
    """A task, an objective and the statistics of the data: what the codec of each field and the layout are chosen by."""

    task: TaskSpec
    objective: Objective
    paradigm: Paradigm
    statistics: Mapping[str, FieldStatistics]
    ranges: Ranges
    largest_return: float  # largest absolute return in the data
    superset: bool = False  # the statistics also count episodes that are not in the data
    framed: Framed | None = None
    discounted: Discounted | None = None
    agents: int = 0  # > 0: task and statistics are those of one of so many agents
    agent_fields: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        return self.paradigm.scheme if self.objective.scheme == "auto" else self.objective.scheme

    @property
    def softmax(self) -> str:
        return self.paradigm.softmax if self.objective.softmax == "auto" else self.objective.softmax

    def linear(self, part: Part) -> bool:
        """Whether the continuous actions of a part are regressed vectors instead of ids."""
        choice = self.objective.discretise
        if self.objective.head != "auto":
            return self.objective.head != "bins"
        return part.code == "linear" if choice == "auto" else choice == "no"

    def option(self, name: str, default: Any) -> Any:
        return self.objective.options.get(name, default)

    def where(self, field: FieldSpec) -> str:
        return f"task {self.task.name!r}, field {field.name!r}"

    def of_agents(self) -> Encoding:
        """The encoding of what one agent sees and does. Raises DataError if the actions are not those of several agents."""
        agents = int(self.option("agents", 0))
        names = agent_fields(self.task, agents)
        task, statistics = (
            of_one_agent(self.task, names, agents),
            statistics_of_one_agent(self.statistics, names, agents),
        )
        return replace(self, task=task, statistics=statistics, agents=agents, agent_fields=names)

    @property
    def prompt_share(self) -> float:
        return self.paradigm.prompt.share if self.objective.prompt < 0 else self.objective.prompt

    def tokens(self, field: FieldSpec) -> FieldTokens:
        """What the recipe says of a field: under its name, else under the first pattern that matches, else the defaults."""
        from tiphys.recipes.sections.objective import FieldTokens

        given = self.objective.fields
        if field.name in given:
            return given[field.name]
        return next((t for pattern, t in given.items() if fnmatchcase(field.name, pattern)), FieldTokens())

    def shown(self, *roles: str) -> list[FieldSpec]:
        return [f for f in self.task.with_role(*roles) if self.tokens(f).encoding != "skip"]

    def chunk(self) -> int:
        """Steps from one observed step to the next. Raises DataError if the fields and the objective disagree."""
        if self.objective.chunk:
            single = {self.tokens(f).chunk for f in self.shown("action")} - {1, self.objective.chunk}
            if single:
                raise DataError(
                    f"task {self.task.name!r}: the objective's `chunk` is {self.objective.chunk}, but that of a field is "
                    f"{min(single)}; leave one out"
                )
            return self.objective.chunk
        chunks = {max(1, self.tokens(f).chunk) for f in self.shown("action")}
        if len(chunks) > 1:
            raise DataError(
                f"task {self.task.name!r}: all action fields must have the same `chunk`, but they have {sorted(chunks)}"
            )
        return chunks.pop() if chunks else 1

    def wanted(self, field: FieldSpec, part: Part) -> str:
        """The encoding that the recipe gives a field, else the code that the part gives to fields of its kind."""
        given = self.tokens(field).encoding
        if given != "auto" or (part.code in ("uniform", "quantile") and field.modality != "continuous"):
            return given
        return part.code

    def beyond_bins(self) -> bool:
        """Whether the objective predicts whole chunks as vectors, whatever else is said of the action."""
        return self.objective.head in ("l2", "l1", "flow") or self.objective.horizon > self.chunk()

    def data_range(self, field: FieldSpec) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of a field in the data. Raises DataError without statistics."""
        found = self.statistics.get(field.name)
        if found is None or not found.count:
            raise DataError(
                f"{self.where(field)}: it has no bounds, and the dataset has no statistics of it; give `low` and `high` in the "
                "mapping file and convert again"
            )
        quantile = float(self.option("action_quantile", 0.0))
        low, high = quantiles_of(found, (quantile, 1 - quantile), field)
        return low, high


def plain_numbers(array: np.ndarray) -> tuple[float, ...]:
    return tuple(np.asarray(array, np.float64).reshape(-1).tolist())


def bounds_of(field: FieldSpec) -> tuple[np.ndarray, np.ndarray] | None:
    """The bounds of the space, one number or one for each entry; None if one is not finite or high is not above low."""
    if field.low is None or field.high is None:
        return None
    low, high = (
        np.asarray(b, np.float64) if len(b) == 1 else field.entries(b).reshape(-1) for b in (field.low, field.high)
    )
    usable = np.isfinite(low).all() and np.isfinite(high).all() and (high > low).all()
    return (low, high) if usable else None


def quantiles_of(found: FieldStatistics, shares: Sequence[float] | np.ndarray, field: FieldSpec) -> Any:
    """[len(shares)] arrays [numbers]: quantiles of the data."""
    numbers = int(np.prod(field.shape, dtype=np.int64))
    out = found.at(shares)
    return list(np.broadcast_to(out, (len(out), numbers)))
