"""Vocabulary: disjoint ranges of ids for text, continuous and discrete values, and the embedders and heads for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.dataio.stored import number, stored

CONTINUOUS_BINS = 1024  # Reed et al. 2022, sec. 2.1
DISCRETE_VALUES = 1024
SPECIALS = ("separator", "embedded", "mask", "end_of_text")
_MORE_SPECIALS = ("end", "summary")  # they follow SPECIALS; files of a vocabulary do not name them
_SPECIAL_IDS = 64  # leaves room for more, and keeps the vocabulary's size a good one for matrix products
EMBEDDER_KINDS = ("patch", "vector", "grid", "tile")


@dataclass(frozen=True)
class EmbedderSpec:
    """What one embedder takes.

    Parameters
    ----------
    kind : str
        ``patch`` (a ResNet block on a normalised patch), ``vector`` (an MLP), ``grid`` (cell embeddings and a small
        convolution) or ``tile`` (cell embeddings and an MLP).
    shape : tuple of int
        Of one value: (16, 16, channels) for a patch, (numbers,) for a vector, (height, width, channels) for a grid
        or a tile of one.
    values : int
        Grid and tile: how many values an entry of a cell can have. 0 for the other kinds.

    Raises
    ------
    DataError
        If there is no such kind.
    """

    kind: str
    shape: tuple[int, ...]
    values: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EMBEDDER_KINDS:
            raise DataError(f"embedder kind {self.kind!r} is unknown; the kinds are {', '.join(EMBEDDER_KINDS)}")
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def merged(self, other: EmbedderSpec, name: str) -> EmbedderSpec:
        """The embedder that serves both. Raises DataError if kind or shape differ, because then tasks cannot share one."""
        if (self.kind, self.shape) != (other.kind, other.shape):
            raise DataError(
                f"two tasks need embedder {name!r}, one as {self}, one as {other}; rename the field of one task"
            )
        return EmbedderSpec(self.kind, self.shape, max(self.values, other.values))


@dataclass(frozen=True)
class Vocabulary:
    """Every id, embedder and regression head of a run. The ranges are disjoint and cover [0, size).

    The sizes of the continuous and the discrete range follow Reed et al. 2022, sec. 2.1.

    Parameters
    ----------
    size : int
        Number of ids.
    ranges : tuple of (str, int, int)
        (name, low, high): the ids in [low, high). Softmax i > 0 of a TokenBatch is ``ranges[i - 1]``.
    separator, embedded, mask, end_of_text : int
        Ids of the special tokens. ``embedded`` stands at a position that holds a value for an embedder.
    embedders : mapping of str to EmbedderSpec
        By name: "patch:3", "vector:observation:39", "grid:observation.image:7x7x3", "vector:return:1".
    regressions : mapping of str to int
        Regression head -> numbers that it predicts: "action:6" -> 6.
    tasks : tuple of str
        Names of the tasks; TokenBatch.task is an index into it.
    pairs : bool
        Whether windows are told from each other by their texts.
    text_tokenizer : str
        JSON of the Hugging Face ``tokenizers`` library.
    chunks : mapping of str to mapping
        Head that predicts chunks of actions -> `codecs.Chunk.head`.

    Raises
    ------
    DataError
        If the ranges overlap, leave a gap, or do not end at ``size``.
    """

    size: int
    ranges: tuple[tuple[str, int, int], ...]
    separator: int
    embedded: int
    mask: int
    end_of_text: int
    embedders: Mapping[str, EmbedderSpec] = field(default_factory=dict)
    regressions: Mapping[str, int] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    text_tokenizer: str = ""
    pairs: bool = False
    chunks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = tuple((str(name), int(low), int(high)) for name, low, high in self.ranges)
        object.__setattr__(self, "ranges", ranges)
        object.__setattr__(self, "tasks", tuple(self.tasks))
        end = 0
        for name, low, high in ranges:
            if low != end or high <= low:
                raise DataError(f"vocabulary: range {name!r} is [{low}, {high}), but the range before it ends at {end}")
            end = high
        if end != self.size:
            raise DataError(f"vocabulary: the ranges end at {end}, but its size is {self.size}")

    @classmethod
    def build(
        cls,
        text: int,
        *,
        continuous: int = CONTINUOUS_BINS,
        discrete: int = DISCRETE_VALUES,
        embedders: Mapping[str, EmbedderSpec] | None = None,
        regressions: Mapping[str, int] | None = None,
        tasks: Iterable[str] = (),
        text_tokenizer: str = "",
    ) -> Vocabulary:
        """A vocabulary with text in [0, text), then continuous, discrete and special ids.

        The first ids of the text and of the continuous range depend on `text` alone.

        Parameters
        ----------
        text, continuous, discrete : int
            Number of ids of each range.
        embedders, regressions, tasks, text_tokenizer
            As in the class.
        """
        ranges, low = [], 0
        for name, size in (
            ("text", text),
            ("continuous", continuous),
            ("discrete", discrete),
            ("special", _SPECIAL_IDS),
        ):
            ranges.append((name, low, low + size))
            low += size
        special: dict[str, Any] = {name: ranges[-1][1] + i for i, name in enumerate(SPECIALS)}
        return cls(
            size=low,
            ranges=tuple(ranges),
            embedders=dict(sorted((embedders or {}).items())),
            regressions=dict(sorted((regressions or {}).items())),
            tasks=tuple(tasks),
            text_tokenizer=text_tokenizer,
            **special,
        )

    def special(self, name: str) -> int:
        """The id of a special token: one of SPECIALS, `end` (of an episode) or `summary` (of a window)."""
        return self.range("special")[0] + (*SPECIALS, *_MORE_SPECIALS).index(name)

    @property
    def answers(self) -> tuple[int, int]:
        """The ids that say whether a text fits a window: no and yes, the discrete values 0 and 1."""
        low = self.range("discrete")[0]
        return low, low + 1

    def range(self, name: str) -> tuple[int, int]:
        """[low, high) of a range. Raises KeyError if there is no such range."""
        for known, low, high in self.ranges:
            if known == name:
                return low, high
        raise KeyError(f"the vocabulary has no range {name!r}; it has {', '.join(r[0] for r in self.ranges)}")

    def softmax(self, name: str) -> int:
        """The number that stands for a range in TokenBatch.softmax. Raises ValueError if there is no such range."""
        return [r[0] for r in self.ranges].index(name) + 1

    def name_of(self, token: int) -> str:
        """Name of the range that an id lies in. Raises KeyError if the id is outside the vocabulary."""
        for name, low, high in self.ranges:
            if low <= token < high:
                return name
        raise KeyError(f"id {token} is outside the vocabulary; its ids are 0 … {self.size - 1}")

    def to_dict(self) -> dict[str, Any]:
        """JSON. `pairs` and `chunks` are left out if there are none."""
        return {k: v for k, v in asdict(self).items() if k not in ("pairs", "chunks") or v}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`. Raises DataError if it is not valid."""
        found = values.get("embedders", {}) if isinstance(values, Mapping) else {}
        if not isinstance(found, Mapping):
            raise DataError("vocabulary: embedders is not an object with keys")
        embedders = {name: stored(EmbedderSpec, spec, f"vocabulary, embedder {name!r}") for name, spec in found.items()}
        made = stored(cls, values, "vocabulary", embedders=embedders)
        for name in SPECIALS:
            number(getattr(made, name), f"vocabulary, {name}", 0, made.size - 1)
        for name, spec in embedders.items():
            for n in (*spec.shape, spec.values + 1):
                number(n, f"vocabulary, embedder {name!r}", 1, 1 << 24)
        for name, n in made.regressions.items():
            number(n, f"vocabulary, regression {name!r}", 1, 1 << 24)
        number(made.size, "vocabulary, size", 1, 1 << 26)
        return made
