"""The vocabulary of the data: FieldSpec, TaskSpec, Episode, Window. NumPy only; nothing here knows tokens or stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

ROLES = ("observation", "action", "reward", "terminated", "truncated", "text", "mask", "info")
MODALITIES = ("image", "text", "discrete", "continuous")


class DataError(ValueError):
    """Data that is not what it should be. The message names the object, the key or byte range, and what to do."""


@dataclass(frozen=True)
class FieldSpec:
    """One field of a task's timestep.

    name      dotted, as the environment nests it: `observation`, `observation.image`, `action`, `reward`
    role      one of ROLES
    modality  one of MODALITIES
    dtype     NumPy's name (`float32`, `uint8`, …); `str` for text
    shape     of one step, without time; () for a scalar or a text
    low, high bounds of the space where it has any (broadcast over `shape`), else None
    values    number of values of a discrete field (the largest over its dimensions); 0: unknown
    per       `step`: an array with a row a step; `episode`: one value for the whole episode (an instruction)
    """

    name: str
    role: str
    modality: str
    dtype: str
    shape: tuple[int, ...] = ()
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    values: int = 0
    per: str = "step"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"field {self.name!r}: role {self.role!r} is none of {', '.join(ROLES)}")
        if self.modality not in MODALITIES:
            raise DataError(f"field {self.name!r}: modality {self.modality!r} is none of {', '.join(MODALITIES)}")
        if self.per not in ("step", "episode"):
            raise DataError(f"field {self.name!r}: per {self.per!r} is neither 'step' nor 'episode'")
        for key in ("shape", "low", "high"):  # JSON gives lists
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, tuple(value))

    @property
    def bytes_per_step(self) -> int:
        """Bytes of one step; 0 for text, whose length varies."""
        return 0 if self.dtype == "str" else int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class TaskSpec:
    """A task: its fields, and, where it has one, its environment with the scores that normalise a return there."""

    name: str
    fields: tuple[FieldSpec, ...]
    environment: str = ""  # what `tiphys.dataio.environments.make` takes; empty: data without an environment
    normalise: str = "return"  # return | success: which of the two `random` and `expert` measure
    random: float | None = None  # score of uniformly random actions
    expert: float | None = None  # score of the expert
    max_steps: int = 0  # horizon of the environment; 0: unknown

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "fields", tuple(f if isinstance(f, FieldSpec) else FieldSpec(**f) for f in self.fields)
        )

    def field(self, name: str) -> FieldSpec:
        for spec in self.fields:
            if spec.name == name:
                return spec
        raise DataError(f"task {self.name!r} has no field {name!r}; it has {', '.join(f.name for f in self.fields)}")

    def with_role(self, *roles: str) -> tuple[FieldSpec, ...]:
        """Fields of these roles, sorted by name."""
        return tuple(sorted((f for f in self.fields if f.role in roles), key=lambda f: f.name))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Episode:
    """One episode of T actions.

    fields    name -> array [T, *shape] for actions, rewards and flags; [T, *shape] or [T + 1, *shape] for observations
              (the last row is what the last action led to). Text that changes by step: array [T] or [T + 1] of
              NumPy's StringDType. A field with `per: episode` is a str (text) or an array of `shape`.
    An episode without actions (an image with its caption, a document) has T = 0 and one row.
    """

    id: str
    task: str
    fields: Mapping[str, Any]
    steps: int  # T, the number of actions
    success: bool | None = None
    agent: str = ""  # who acted: an expert's name, a checkpoint, a person
    info: Mapping[str, Any] = field(default_factory=dict)  # small JSON values that go into the sample's .json member

    @property
    def total_return(self) -> float:
        """Undiscounted sum of rewards; 0.0 without a `reward` field."""
        reward = self.fields.get("reward")
        return 0.0 if reward is None else float(np.sum(reward[: self.steps], dtype=np.float64))


@dataclass(slots=True)
class Window:
    """Consecutive rows [start, start + steps) of one episode, in memory, with what an objective asked for beside them.

    fields          name -> array [steps (+ after), *shape]; rows past the episode's end are absent, never padded.
                    Fields with `per: episode` as in Episode.
    steps           units in the window itself (rows of `steps.npy`); `after` further rows follow where they exist
    step            int64 [rows]: each row's number in its episode
    returns_to_go   float32 [rows]: undiscounted sum of the rewards from this row on; 0 without rewards
    valid           bool [rows]: False where the row holds only an observation
    prompt          True: this window is the row's prompt (a demonstration of the same task), not the thing learned
    """

    entry: int  # line of the mixture
    task: int  # number of the task in the run's list of tasks (Objectives.tasks)
    episode: str  # the episode's id
    start: int
    steps: int
    episode_steps: int  # T of the episode
    fields: Mapping[str, Any]
    step: np.ndarray
    returns_to_go: np.ndarray
    valid: np.ndarray
    prompt: bool = False
    tokens: int = 0  # tokens that the plan set aside for it


@dataclass(frozen=True)
class Needs:
    """What an objective asks of an episode beside a window's own rows: which fields, and how many rows past its end."""

    fields: tuple[str, ...]  # names; what is not named is never fetched
    after: int = 0
