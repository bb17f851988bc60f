"""Chooses the codec of an observed field: what the recipe or the part says, else by the scheme."""

from __future__ import annotations

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.pretrain.tokens.codec import Codec
from tiphys.pretrain.tokens.discrete_range import discrete_range
from tiphys.pretrain.tokens.encoding import Encoding, bounds_of, plain_numbers, quantiles_of
from tiphys.pretrain.tokens.id_codecs import Bins, Discrete, Quantiles
from tiphys.pretrain.tokens.paradigm import GRIDS, Part
from tiphys.pretrain.tokens.picture_codecs import Grid, Patches, Tiles
from tiphys.pretrain.tokens.vector_codecs import Vector
from tiphys.pretrain.tokens.vocabulary import CONTINUOUS_BINS

_MANY = 16  # in the compact scheme, a discrete vector with more entries becomes one token


def observation_codec(encoding: Encoding, field: FieldSpec, part: Part) -> Codec:
    kind = encoding.wanted(field, part)
    if kind == "auto":
        kind = encoding.scheme if encoding.scheme == "gato" else compact_encoding(encoding, field)
    if kind in ("integer", "sign"):
        raise DataError(f"{encoding.where(field)}: encoding {kind!r} is for rewards, not for an observation")
    if kind in GRIDS:
        return grid_codec(encoding, field, kind)
    if kind == "vector":
        return vector_codec(encoding, field)
    if kind in ("uniform", "quantile"):
        return binned_codec(encoding, field, kind)
    if field.modality == "image":
        return patches_codec(encoding, field)
    if field.modality == "discrete":
        return discrete_codec(encoding, field)
    return gato_codec(encoding, field)


def compact_encoding(encoding: Encoding, field: FieldSpec) -> str:
    if field.modality == "continuous":
        return "vector"
    if field.modality == "discrete" and len(field.shape) in (2, 3):
        return "grid"
    if field.modality == "discrete" and np.prod(field.shape, dtype=np.int64) > _MANY:
        return "vector"
    return "gato"


def discrete_codec(encoding: Encoding, field: FieldSpec) -> Codec:
    values, low = counted(encoding, field)
    if max(values) > encoding.ranges.discrete_size:
        raise DataError(
            f"{encoding.where(field)}: it has {max(values)} values, more than the {encoding.ranges.discrete_size} discrete ids; "
            "set `encoding: skip` for it, or declare it continuous"
        )
    return Discrete("", field.shape, encoding.ranges.discrete, values, low, field.dtype)


def counted(encoding: Encoding, field: FieldSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The number of values of each entry of a discrete field, and its lowest value."""
    found = encoding.statistics.get(field.name)
    # If the statistics count the values beyond the range, `data.on_bad_value` decides what is done about them
    exact = not encoding.superset and (found is None or found.beyond is None)
    return discrete_range(field, found, encoding.where(field), exact=exact)


def gato_codec(encoding: Encoding, field: FieldSpec) -> Codec:
    return Bins("", field.shape, encoding.ranges.continuous, CONTINUOUS_BINS, companded=True, dtype=field.dtype)


def binned_codec(encoding: Encoding, field: FieldSpec, kind: str) -> Codec:
    """Bins for each dimension: uniform over the field's bounds (else the data's range), or by the data's quantiles."""
    bins = encoding.tokens(field).bins
    if field.modality not in ("continuous", "discrete"):
        raise DataError(
            f"{encoding.where(field)}: encoding {kind!r} is for continuous and discrete fields, not for {field.modality!r}"
        )
    found = encoding.statistics.get(field.name)
    bounds = bounds_of(field) if kind == "uniform" else None
    if bounds is None and (found is None or not found.count):
        raise DataError(
            f"{encoding.where(field)}: encoding {kind!r} needs statistics of the field, and the dataset has none"
        )
    if kind == "uniform":
        low, high = bounds or quantiles_of(found, (0.0, 1.0), field)  # type: ignore[arg-type]
        return Bins(
            "",
            field.shape,
            encoding.ranges.continuous,
            bins,
            plain_numbers(low),
            plain_numbers(high),
            False,
            field.dtype,
        )
    edges = np.stack(quantiles_of(found, np.linspace(0, 1, bins + 1), field), axis=1)  # type: ignore[arg-type]
    return Quantiles("", field.shape, encoding.ranges.continuous, tuple(map(Quantiles.merged, edges)), field.dtype)


def patches_codec(encoding: Encoding, field: FieldSpec) -> Codec:
    tokens, shape = encoding.tokens(field), field.shape
    first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    if len(shape) not in (2, 3):
        raise DataError(
            f"{encoding.where(field)}: an image has shape [height, width] or [height, width, channels], not {shape}; "
            "skip the field, or convert each camera to a field of its own"
        )
    if 0 in shape and not tokens.resize:
        raise DataError(
            f"{encoding.where(field)}: its images differ in size; give `resize`, so that all become the same size"
        )
    known = field.image_range
    if known is None:
        raise DataError(
            f"{encoding.where(field)}: its images are {field.dtype} without bounds, so the values of black and white are "
            "unknown; give `low` and `high` in the mapping file and convert again, or set `encoding: skip` for it"
        )
    black, white = known
    channels = (shape[0] if first else shape[2]) if len(shape) == 3 else 1
    return Patches(f"patch:{channels}", shape, tokens.crop, tokens.resize, first, white, black)


def grid_codec(encoding: Encoding, field: FieldSpec, kind: str) -> Codec:
    """The codec of a small grid, as one token or one for each row or cell."""
    if len(field.shape) not in (2, 3) or field.modality == "continuous":
        raise DataError(
            f"{encoding.where(field)}: encoding {kind!r} needs discrete values of shape [height, width] or "
            f"[height, width, channels], not {field.modality} values of shape {field.shape}"
        )
    values, low = ((256,), (0,)) if field.modality == "image" else counted(encoding, field)
    height, width, channels = (*field.shape, 1)[:3]
    if kind == "grid":
        return Grid(f"grid:{field.name}:{height}x{width}x{channels}", field.shape, values, low, field.dtype)
    tile = (1, width if kind == "rows" else 1)
    name = f"tile:{field.name}:{tile[0]}x{tile[1]}x{channels}"
    return Tiles(name, field.shape, values, low, field.dtype, tile)


def vector_codec(encoding: Encoding, field: FieldSpec) -> Codec:
    numbers = int(np.prod(field.shape, dtype=np.int64))
    found = encoding.statistics.get(field.name)
    if found is None or not found.count:
        raise DataError(
            f"{encoding.where(field)}: encoding 'vector' needs statistics of the field, and the dataset has none"
        )
    mean, std = np.asarray(found.mean, np.float64).reshape(-1), np.asarray(found.std, np.float64).reshape(-1)
    # The std of an entry that is constant in the data is 0, which is no scale for a value that differs: use its size.
    std = np.where(std > 1e-6 * (1 + np.abs(mean)), std, np.maximum(1.0, np.abs(mean)))
    return Vector(f"vector:{field.name}:{numbers}", field.shape, plain_numbers(mean), plain_numbers(std), field.dtype)
