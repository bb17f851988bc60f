"""What the codecs of all layouts need of the vocabulary: sizes of ranges, embedders and heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.codec import Codec
from tiphys.pretrain.tokens.id_codecs import Bins, Discrete, Integers, Quantiles, Sign
from tiphys.pretrain.tokens.sequence import Layouts
from tiphys.pretrain.tokens.vector_codecs import Chunk
from tiphys.pretrain.tokens.vocabulary import CONTINUOUS_BINS, DISCRETE_VALUES, EmbedderSpec


@dataclass(frozen=True)
class Ranges:
    """First ids and sizes of the vocabulary's ranges for continuous and discrete values."""

    continuous: int
    continuous_size: int
    discrete: int
    discrete_size: int


def range_sizes(layouts: Layouts) -> tuple[int, int]:
    """Numbers of continuous and of discrete ids: Gato's, or more if the codecs need more."""
    continuous, discrete = CONTINUOUS_BINS, DISCRETE_VALUES
    for codec in _codecs(layouts):
        if isinstance(codec, Discrete | Integers | Sign):
            discrete = max(discrete, *codec.values)
        elif isinstance(codec, Bins | Quantiles):
            continuous = max(continuous, *(high - codec.first for _, high in codec.choices()))
    return continuous, discrete


def _codecs(layouts: Layouts) -> Iterator[Codec]:
    for by_task in layouts:
        for layout in by_task.values():
            yield from (e.codec for e in layout.elements if e.codec is not None)


def heads_of(layouts: Layouts) -> tuple[dict[str, EmbedderSpec], dict[str, int], dict[str, dict[str, Any]]]:
    """The embedders, regression heads and heads of chunks that the layouts of all tasks need."""
    embedders: dict[str, EmbedderSpec] = {}
    for codec in sorted(_codecs(layouts), key=lambda c: c.embedder):
        if codec.embedder:
            spec = codec.embedder_spec()
            embedders[codec.embedder] = embedders.get(codec.embedder, spec).merged(spec, codec.embedder)
    heads = ((e.head, e.codec) for by_task in layouts for t in by_task.values() for e in t.elements if e.head)
    regressions: dict[str, int] = {}
    chunks: dict[str, dict[str, Any]] = {}
    for head, predicted in heads:
        if isinstance(predicted, Chunk):
            if chunks.setdefault(head, predicted.head) != predicted.head:
                raise DataError(
                    f"two objectives predict chunks by the head {head!r} with other sizes: {chunks[head]} and {predicted.head}; "
                    "give them the same `flow`"
                )
        elif predicted is not None:
            regressions[head] = predicted.embedder_spec().shape[0]
    return embedders, regressions, dict(sorted(chunks.items()))
