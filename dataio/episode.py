"""The vocabulary of the data: FieldSpec, TaskSpec, Episode, Window. It needs only NumPy, and knows neither tokens nor stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

ROLES = ("observation", "action", "reward", "terminated", "truncated", "text", "mask", "info")
MODALITIES = ("image", "text", "discrete", "continuous")


class DataError(ValueError):
    """Data are not valid. The message names the object, the key or byte range, and what to do."""


class BadValue(DataError):
    """A window was read correctly, but has a value that cannot be learned from, such as NaN. Reading it again does not help."""


@dataclass(frozen=True)
class FieldSpec:
    """One field of a task.

    Attributes
    ----------
    name : str
        Dotted, as the environment nests it: `observation`, `observation.image`, `action`, `reward`.
    role : str
        One of `ROLES`.
    modality : str
        One of `MODALITIES`.
    dtype : str
        NumPy's name, such as `float32` or `uint8`; `str` for text.
    shape : tuple[int, ...]
        Shape of one step, without time; () for a scalar or a text. An image whose size varies has 0 for that extent.
    low, high : tuple[float, ...] or None
        Lowest and highest value of each entry: one number for all entries, one for each (in C order), or one for each element
        of the last axis. None if there is no bound; an element that is None has no bound. They are the range of a discrete
        field if both are given. Those of an image are the values of black and white (`image_range`).
    values : int
        Number of values of a discrete field, the largest over its entries; 0: unknown. Without low and high, values begin at 0.
    per : str
        `step`: one value for each step. `episode`: one value for the whole episode, such as an instruction.
    unit : str
        Unit of the values, such as `mm` for a depth image; empty: unknown, or none.

    Raises
    ------
    DataError
        If `role`, `modality` or `per` is none of the allowed words.
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
    unit: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"field {self.name!r}: role {self.role!r} is none of {', '.join(ROLES)}")
        if self.modality not in MODALITIES:
            raise DataError(f"field {self.name!r}: modality {self.modality!r} is none of {', '.join(MODALITIES)}")
        if self.per not in ("step", "episode"):
            raise DataError(f"field {self.name!r}: per {self.per!r} is neither 'step' nor 'episode'")
        for key in ("shape", "low", "high"):  # they are lists if they come from JSON
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, tuple(value))
        for key, unbounded in (("low", -math.inf), ("high", math.inf)):  # JSON has no infinity: null stands for it
            if None in (getattr(self, key) or ()):
                bound = (unbounded if v is None else v for v in getattr(self, key))
                object.__setattr__(self, key, tuple(bound))

    def entries(self, bound: tuple[float, ...]) -> np.ndarray:
        """`low` or `high` for each entry, float64 of the field's shape. Raises DataError if it has another number of elements."""
        array = np.asarray(bound, np.float64)
        try:
            return array.reshape(self.shape) if array.size == _size(self.shape) else np.broadcast_to(array, self.shape)
        except ValueError:
            raise DataError(
                f"field {self.name!r}: low and high need one number, or one for each entry of shape {self.shape}, but one of "
                f"them has {array.size}; correct it in the mapping file and convert again"
            ) from None

    @property
    def bytes_per_step(self) -> int:
        """Bytes of one step, uncompressed; 0 for text, whose length varies, and for an image whose size varies."""
        return 0 if self.dtype == "str" else int(np.dtype(self.dtype).itemsize * _size(self.shape))

    @property
    def image_range(self) -> tuple[float, float] | None:
        """The values of black and white of an image: its bounds, else all values of bool, uint8 or uint16.

        None if they are not known: nothing tells whether floats are fractions, metres or millimetres.
        """
        bounds = (*(self.low or ()), *(self.high or ()))
        if self.low and self.high and np.isfinite(bounds).all() and min(self.low) < max(self.high):
            return float(min(self.low)), float(max(self.high))
        full = {"bool": 1.0, "uint8": 255.0, "uint16": 65535.0}.get(self.dtype)
        return None if full is None else (0.0, full)

    def outside(self, values: np.ndarray) -> int:
        """How many elements of [n, *shape] values lie outside the bounds."""
        if self.dtype == "str" or not np.size(values):
            return 0
        count = 0
        for bound, beyond in ((self.low, np.less), (self.high, np.greater)):
            if bound is not None:
                limit = np.asarray(bound, np.float64) if 0 in self.shape else self.entries(bound)
                count += int(beyond(values, limit).sum())
        return count

    def value_range(self) -> tuple[np.ndarray, np.ndarray | None]:
        """What a discrete field declares: the lowest value and the number of values of its elements.

        Both are float64, flat, and broadcast over the elements. The number is None if the field declares neither `high` nor
        `values`, or infinite bounds.
        """
        low = np.asarray(0.0 if self.low is None else self.low, np.float64).reshape(-1)
        if self.high is not None:
            count = np.asarray(self.high, np.float64).reshape(-1) - low + 1
            return low, count if np.isfinite(count).all() else None
        return low, np.array([float(self.values)]) if self.values else None


@dataclass(frozen=True)
class TaskSpec:
    """A task: its fields, and its environment with the scores that normalise a result, if it has one.

    Attributes
    ----------
    name : str
        Unique within a dataset.
    fields : tuple[FieldSpec, ...]
        The fields of its episodes.
    environment : str
        Name for `tiphys.dataio.environments.make`; empty if the data have no environment.
    normalise : str
        What a score is: `return` (undiscounted return) or `success` (1 or 0).
    random : float or None
        Mean score of uniformly random actions; None: not measured.
    expert : float or None
        Mean score of the expert; None: not measured.
    max_steps : int
        Horizon in steps, to which `random` and `expert` refer; 0: that of the environment. An evaluation ends episodes there.

    Raises
    ------
    DataError
        If `normalise` is neither word, or `max_steps` is not a whole number of at least 0.
    """

    name: str
    fields: tuple[FieldSpec, ...]
    environment: str = ""
    normalise: str = "return"
    random: float | None = None
    expert: float | None = None
    max_steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "fields", tuple(f if isinstance(f, FieldSpec) else FieldSpec(**f) for f in self.fields)
        )

        if self.normalise not in ("return", "success"):
            raise DataError(f"task {self.name!r}: normalise {self.normalise!r} is neither 'return' nor 'success'")
        steps = self.max_steps
        whole = isinstance(steps, int) or (isinstance(steps, float) and steps.is_integer())  # YAML reads 1e3 as a float
        if isinstance(steps, bool) or not whole or steps < 0:
            raise DataError(f"task {self.name!r}: max_steps {steps!r} is not a whole number of at least 0")
        object.__setattr__(self, "max_steps", int(steps))

    def field(self, name: str) -> FieldSpec:
        """The field of this name. Raises DataError if there is none."""
        for spec in self.fields:
            if spec.name == name:
                return spec
        raise DataError(f"task {self.name!r} has no field {name!r}; it has {', '.join(f.name for f in self.fields)}")

    def with_role(self, *roles: str) -> tuple[FieldSpec, ...]:
        """Fields of these roles, sorted by name."""
        return tuple(sorted((f for f in self.fields if f.role in roles), key=lambda f: f.name))

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts. `TaskSpec(**task.to_dict())` equals `task`. Fields without a unit have no key `unit`."""
        out = asdict(self)
        out["fields"] = tuple({k: v for k, v in f.items() if k != "unit" or v} for f in out["fields"])
        return out


@dataclass(frozen=True)
class Episode:
    """One episode of T actions.

    An episode without actions (an image with its caption, a document) has T = 0 and one row.

    Attributes
    ----------
    id : str
        1 to 512 bytes of UTF-8.
    task : str
        Name of its task.
    fields : Mapping[str, Any]
        Field name -> values. Actions, rewards and flags are arrays [T, *shape]. Observations are arrays [T, *shape] or
        [T + 1, *shape]; row T is the observation after the last action. Text that changes by step is an array [T] or [T + 1] of
        NumPy's StringDType. A field with `per="episode"` is a str, or an array of its shape.
    steps : int
        T, the number of actions.
    success : bool or None
        None: unknown.
    agent : str
        Who acted: an expert's name, a checkpoint, a person.
    info : Mapping[str, Any]
        Small JSON values, which are stored in the sample's `.json` member.
    """

    id: str
    task: str
    fields: Mapping[str, Any]
    steps: int
    success: bool | None = None
    agent: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_return(self) -> float:
        """Undiscounted sum of the field `reward`; 0.0 if the episode has no such field."""
        reward = self.fields.get("reward")
        return 0.0 if reward is None else float(np.sum(reward[: self.steps], dtype=np.float64))


@dataclass(slots=True)
class Window:
    """Consecutive steps [start, start + steps) of one episode, in memory, and the rows after them that an objective asked for.

    The arrays have R rows: `steps` and up to `Needs.after` more. Rows past the episode's end are absent, never padded.

    Attributes
    ----------
    entry : int
        Number of the mixture entry.
    task : int
        Number of the task in the run's list of tasks (`Objectives.tasks`).
    episode : str
        The episode's id.
    start : int
        First step.
    steps : int
        Steps of the window itself, without the rows after it.
    episode_steps : int
        T, the number of actions of the whole episode.
    fields : Mapping[str, Any]
        Field name -> array [R, *shape]; fields with `per="episode"` as in `Episode`.
    step : int64 [R]
        Each row's step in its episode.
    returns_to_go : float32 [R]
        Undiscounted sum of the rewards from this row on; 0 without rewards.
    valid : bool [R]
        False if the row holds only an observation, without an action.
    prompt : bool
        True: the window is a prompt (a demonstration of the same task), on which no loss is computed.
    tokens : int
        Tokens that the plan reserved for the window.
    given : Mapping[str, ndarray]
        While acting: values [R, …] by the name of the rule that would compute them from the episode's future.
    hidden : Mapping[str, ndarray]
        While acting: bool [R] by kind of part (`observation`, `action`, …): the rows at which it is not known.
    """

    entry: int
    task: int
    episode: str
    start: int
    steps: int
    episode_steps: int
    fields: Mapping[str, Any]
    step: np.ndarray
    returns_to_go: np.ndarray
    valid: np.ndarray
    prompt: bool = False
    tokens: int = 0
    given: Mapping[str, np.ndarray] = field(default_factory=dict)
    hidden: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What an objective needs of an episode for a window."""

    fields: tuple[str, ...]  # names of the fields; other fields are never fetched
    after: int = 0  # rows after the window's last step; at most those that the episode has
    # (field, n): only rows whose number in the episode is a multiple of n are needed; of a video, the others are black
    strides: tuple[tuple[str, int], ...] = ()


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
