"""Vocabulary: disjoint ranges of ids for text, continuous and discrete values, and the names of everything that is not an id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tiphys.dataio.episode import DataError

CONTINUOUS_BINS = 1024  # Reed et al. 2022, sec. 2.1
DISCRETE_VALUES = 1024
SPECIALS = ("separator", "embedded", "mask", "end_of_text")
_SPECIAL_IDS = 64  # room for more, and a vocabulary whose size suits matrix products
EMBEDDER_KINDS = ("patch", "vector", "grid")


@dataclass(frozen=True)
class EmbedderSpec:
    """What one embedder takes.

    kind    patch (a ResNet block on a normalised patch) | vector (an MLP) | grid (cell embeddings and a small convolution)
    shape   of one value: patch (16, 16, channels), vector (numbers,), grid (height, width, channels)
    values  grid: number of values of each cell entry; 0 for the other kinds
    """

    kind: str
    shape: tuple[int, ...]
    values: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EMBEDDER_KINDS:
            raise DataError(f"embedder kind {self.kind!r} is none of {', '.join(EMBEDDER_KINDS)}")
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def merged(self, other: EmbedderSpec, name: str) -> EmbedderSpec:
        """The embedder that serves both; tasks share one where kind and shape agree."""
        if (self.kind, self.shape) != (other.kind, other.shape):
            raise DataError(f"embedder {name!r} is asked for as {self} and as {other}; rename the field of one task")
        return EmbedderSpec(self.kind, self.shape, max(self.values, other.values))


@dataclass(frozen=True)
class Vocabulary:
    """Every id, embedder and regression head of a run. `ranges` are disjoint and cover [0, size).

    ranges          (name, low, high), ids in [low, high); softmax i > 0 of a TokenBatch is ranges[i - 1]
    embedders       name -> EmbedderSpec: "patch:3", "vector:observation:39", "grid:observation.image:7x7x3", "vector:return:1"
    regressions     head -> dimensions: "action:6"
    tasks           names; TokenBatch.task counts here
    text_tokenizer  JSON of the Hugging Face `tokenizers` library
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

    def __post_init__(self) -> None:
        ranges = tuple((str(name), int(low), int(high)) for name, low, high in self.ranges)
        object.__setattr__(self, "ranges", ranges)
        object.__setattr__(self, "tasks", tuple(self.tasks))
        end = 0
        for name, low, high in ranges:
            if low != end or high <= low:
                raise DataError(f"vocabulary: range {name!r} is [{low}, {high}), but the one before it ends at {end}")
            end = high
        if end != self.size:
            raise DataError(f"vocabulary: the ranges end at {end}, not at its size {self.size}")

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
        """Text in [0, text), then continuous, discrete and special ids. Ids of text and of Gato's bins never move."""
        ranges, low = [], 0
        for name, size in (
            ("text", text),
            ("continuous", continuous),
            ("discrete", discrete),
            ("special", _SPECIAL_IDS),
        ):
            ranges.append((name, low, low + size))
            low += size
        special = {name: ranges[-1][1] + i for i, name in enumerate(SPECIALS)}
        return cls(
            size=low,
            ranges=tuple(ranges),
            embedders=dict(sorted((embedders or {}).items())),
            regressions=dict(sorted((regressions or {}).items())),
            tasks=tuple(tasks),
            text_tokenizer=text_tokenizer,
            **special,
        )

    def range(self, name: str) -> tuple[int, int]:
        """[low, high) of a range."""
        for known, low, high in self.ranges:
            if known == name:
                return low, high
        raise KeyError(f"no range {name!r}; there are {', '.join(r[0] for r in self.ranges)}")

    def softmax(self, name: str) -> int:
        """The number under which TokenBatch.softmax knows a range."""
        return [r[0] for r in self.ranges].index(name) + 1

    def name_of(self, token: int) -> str:
        """The range that an id lies in."""
        for name, low, high in self.ranges:
            if low <= token < high:
                return name
        raise KeyError(f"id {token} lies outside the vocabulary of {self.size}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        embedders = {name: EmbedderSpec(**spec) for name, spec in values.get("embedders", {}).items()}
        return cls(**{**values, "embedders": embedders})
