"""All codecs by kind, as they are written to a file and read from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.stored import stored
from tiphys.pretrain.tokens.codec import Codec
from tiphys.pretrain.tokens.id_codecs import Bins, Discrete, Integers, Quantiles, Sign
from tiphys.pretrain.tokens.picture_codecs import Grid, Patches, Tiles
from tiphys.pretrain.tokens.vector_codecs import Affine, Chunk, Histogram, Vector
from tiphys.pretrain.tokens.vocabulary import Vocabulary

_MOST_NUMBERS = 1 << 24  # of a value at one step
CODECS: dict[str, type[Codec]] = {
    c.kind: c
    for c in (Discrete, Bins, Quantiles, Patches, Vector, Affine, Chunk, Grid, Tiles, Integers, Sign, Histogram)
}


def codec_from_dict(values: Mapping[str, Any], where: str = "codec") -> Codec:
    """The inverse of `Codec.to_dict`. Raises DataError if it is not valid."""
    if not isinstance(values, Mapping):
        raise DataError(f"{where}: it is not an object with keys")
    rest = dict(values)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in CODECS:
        raise DataError(
            f"codec {kind!r} is unknown; this version has {', '.join(CODECS)}. Update Tiphys to load this policy"
        )
    return stored(CODECS[kind], rest, where)


def check_codec(codec: Codec, size: int, vocabulary: Vocabulary, where: str) -> None:
    """Try a codec that comes from a file on one value.

    Raises DataError if it does not work, does not take `size` positions, or gives ids or needs an embedder that the vocabulary
    does not have.
    """
    sides = (codec.crop, codec.resize) if isinstance(codec, Patches) else ()
    shape = tuple(n or 1 for n in codec.shape) if sides else codec.shape
    numbers = math.prod(shape)
    if len(shape) > 8 or min(shape, default=1) < 1 or numbers > _MOST_NUMBERS or any(not 0 <= n <= 8192 for n in sides):
        raise DataError(f"{where}: a value of shape {codec.shape} has no size that is possible")
    try:
        value = np.broadcast_to(np.asarray(getattr(codec, "low", 0), np.float64), (1, numbers)).reshape(1, *shape)
        value = np.where(np.isfinite(value), value, 0).astype("uint8" if sides else "float64")
        found = codec.encode(value)
        codec.decode(found)
        if codec.tokens != size or found.shape[:2] != (1, size):
            raise DataError(f"{where}: it takes {codec.tokens} positions, not {size}")
        if codec.embedder:
            fits = vocabulary.embedders.get(codec.embedder)
            if fits is None or fits.shape != codec.embedder_spec().shape:
                raise DataError(f"{where}: the vocabulary has no embedder {codec.embedder!r} for its values")
        else:
            choices = codec.choices() if not isinstance(codec, Affine) else ()
            if any(not 0 <= low < high <= vocabulary.size for low, high in choices):
                raise DataError(f"{where}: it gives ids that the vocabulary does not have")
    except DataError:
        raise
    except Exception as error:  # NumPy refuses impossible shapes, types and numbers with errors of many classes
        raise DataError(f"{where}: the codec does not work: {error}") from None
