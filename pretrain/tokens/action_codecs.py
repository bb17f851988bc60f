"""Chooses the codec of an action: its range, what it is counted from, and chunks that one head predicts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.pretrain.tokens.codec import Codec
from tiphys.pretrain.tokens.encoding import Encoding, bounds_of, plain_numbers
from tiphys.pretrain.tokens.field_codecs import binned_codec, discrete_codec
from tiphys.pretrain.tokens.frames import Frame, flat_entries, frame_of, range_of
from tiphys.pretrain.tokens.id_codecs import Bins, Discrete
from tiphys.pretrain.tokens.paradigm import ACTION, GRIDS, Part
from tiphys.pretrain.tokens.timestep import BOTH, Element
from tiphys.pretrain.tokens.vector_codecs import Affine, Chunk
from tiphys.pretrain.tokens.views import AGENTS, ONE
from tiphys.pretrain.tokens.vocabulary import CONTINUOUS_BINS

CLIPPED = 1e-3  # share of an action field's values that may be outside the range of its tokens
_POSITIONS = 1 << 16  # that the noise of flow matching tells apart
_LEVELS = np.linspace(0, 1, 1001)


def action_codec(encoding: Encoding, field: FieldSpec, part: Part) -> Codec:
    kind = encoding.wanted(field, part)
    kind = "auto" if kind == "linear" else kind
    if kind in ("vector", *GRIDS, "integer", "sign"):
        raise DataError(
            f"{encoding.where(field)}: an action cannot have encoding {kind!r}; `discretise: no` regresses it as a vector"
        )
    if field.modality == "discrete":
        return discrete_codec(encoding, field)
    if field.modality != "continuous":
        raise DataError(
            f"{encoding.where(field)}: an action must be discrete or continuous, not {field.modality!r}; "
            "set `encoding: skip` for it"
        )
    frame, normalise, head = action_frame(encoding, field), encoding.tokens(field).normalise, encoding.objective.head
    if encoding.beyond_bins() or (encoding.linear(part) and frame is not None):
        return chunk_codec(encoding, field, "l2" if head == "auto" else head)
    if kind == "quantile" and frame is None and normalise == "auto":
        return binned_codec(encoding, field, kind)
    if frame is not None or normalise != "auto":
        low, high, beyond = normalisation(
            encoding, field, "bounds" if normalise == "auto" else normalise, encoding.chunk()
        )
        refuse_clipped(encoding, field, beyond, "choose `normalise: bounds`")
    else:
        low, high = action_range(encoding, field)
    if kind == "auto" and encoding.linear(part):
        numbers = int(np.prod(field.shape, dtype=np.int64))
        return Affine(f"vector:{field.name}:{numbers}", field.shape, low, high, 1.0, field.dtype)
    bins = encoding.tokens(field).bins if kind == "uniform" else CONTINUOUS_BINS
    return Bins("", field.shape, encoding.ranges.continuous, bins, low, high, False, field.dtype)


def action_range(encoding: Encoding, field: FieldSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(low, high) that is mapped to [-1, 1]: the bounds of the space, else the range of the data.

    If that range is within [-1, 1], it becomes ((-1,), (1,)): values stay as they are. Raises DataError if more than 0.1 % of
    the data would be clamped, unless `allow_clipped` is at least that share.
    """
    low, high = encoding.data_range(field) if (bounds := bounds_of(field)) is None else bounds
    refuse_clipped(
        encoding, field, clipped_share(encoding, field), "widen `low`/`high` in the mapping file and convert again"
    )
    if _within_unit(low, high):
        return (-1.0,), (1.0,)
    return plain_numbers(low), plain_numbers(high)


def clipped_share(encoding: Encoding, field: FieldSpec) -> float:
    """Share of an action field's values in the data that are clamped."""
    found, bounds = encoding.statistics.get(field.name), bounds_of(field)
    tokens = encoding.tokens(field)
    if field.modality == "continuous" and (tokens.relative.to or tokens.normalise != "auto" or encoding.beyond_bins()):
        return clipped_in_frame(encoding, field)
    if field.modality != "continuous" or found is None or not found.count:
        return 0.0
    if bounds is None:
        return 2 * float(encoding.option("action_quantile", 0.0))
    if _within_unit(*bounds) and _within_unit(found.min, found.max):
        return 0.0
    return found.clipped


def clipped_in_frame(encoding: Encoding, field: FieldSpec) -> float:
    """Share of the clamped values of an action that is relative or normalised by its data; 0 for chunks."""
    codecs = [action_codec(encoding, field, part) for part in encoding.paradigm.timestep if part.kind == ACTION]
    if not codecs or isinstance(codecs[0], Chunk):
        return 0.0
    kind = encoding.tokens(field).normalise
    return normalisation(encoding, field, "bounds" if kind == "auto" else kind, encoding.chunk())[2]


def refuse_clipped(encoding: Encoding, field: FieldSpec, clipped: float, instead: str) -> None:
    """Raises DataError if more of a field's values would be clamped than the objective allows."""
    if clipped > float(encoding.option("allow_clipped", CLIPPED)):
        raise DataError(
            f"{encoding.where(field)}: {clipped:.2%} of its values lie outside low/high and would be clipped; {instead}, or set "
            f"`options: {{allow_clipped: {math.ceil(clipped * 1e4) / 1e4:.4f}}}` of the objective"
        )


def in_frame(encoding: Encoding, element: Element) -> Element:
    """The element of an action with what it is counted from."""
    frame = action_frame(encoding, encoding.task.field(element.field))
    return element if frame is None else replace(element, to=frame.to, columns=frame.columns)


def action_frame(encoding: Encoding, field: FieldSpec) -> Frame | None:
    """What an action is counted from. Raises DataError if that cannot be."""
    frame = frame_of(encoding.task, field, encoding.tokens(field).relative)
    if frame is not None and encoding.paradigm.mask == BOTH:
        raise DataError(
            f"{encoding.where(field)}: paradigm {encoding.paradigm.name!r} infers actions, so they stay absolute"
        )
    if frame is not None and (encoding.paradigm.views != ONE or encoding.paradigm.acting[0] == "beam"):
        raise DataError(f"{encoding.where(field)}: paradigm {encoding.paradigm.name!r} has absolute actions only")
    return frame


def normalisation(
    encoding: Encoding, field: FieldSpec, kind: str, horizon: int
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """(low, high) of an action that become −1 and 1, by the values that are predicted; and the share of them outside."""
    frame = action_frame(encoding, field)
    if frame is not None:
        assert encoding.framed is not None
        found = encoding.framed(field, frame, horizon)
    elif (known := encoding.statistics.get(field.name)) is None or not known.count:
        raise DataError(
            f"{encoding.where(field)}: `normalise: {kind}` needs statistics of the field, and the dataset has none"
        )
    else:
        found = known
    low, high = range_of(found, kind)
    if len(low) != flat_entries(field.shape):
        raise DataError(
            f"{encoding.where(field)}: the dataset has no statistics of its single entries; set `encoding: skip`"
        )
    values = found.at(_LEVELS)
    return plain_numbers(low), plain_numbers(high), float(((values < low) | (values > high)).mean())


def chunk_codec(encoding: Encoding, field: FieldSpec, loss: str) -> Codec:
    """The codec of chunks of actions that one head predicts."""
    chunk, given = encoding.chunk(), encoding.tokens(field).normalise
    horizon = encoding.objective.horizon or chunk
    low, high, _ = normalisation(encoding, field, "quantile" if given == "auto" else given, horizon)
    flow, entries = encoding.objective.flow, flat_entries(field.shape)
    more = (
        {"width": flow.width, "depth": flow.depth, "draws": flow.draws, "euler": flow.steps} if loss == "flow" else {}
    )
    more |= {"insulate": bins} if (bins := encoding.objective.insulate) else {}
    name = f"vector:{field.name}:{chunk}x{entries}" + (f":{horizon}" if horizon > chunk else "") + f":{loss}"
    name += f":{bins}" if bins else ""
    return Chunk(name, field.shape, chunk, horizon, low, high, loss, **more, dtype=field.dtype)


def check_chunks(encoding: Encoding) -> None:
    """Raises DataError if the recipe's horizon, chunk and head cannot be."""
    where, given = f"task {encoding.task.name!r}", encoding.objective
    fields, chunk = encoding.shown("action"), encoding.chunk()
    head = given.head in ("l2", "l1", "flow")
    if given.head != "auto" and given.discretise != "auto" and (given.discretise == "yes") == head:
        raise DataError(f"{where}: `head: {given.head}` contradicts `discretise: {given.discretise}`; leave one out")
    if given.insulate and not (head or given.horizon > chunk):
        raise DataError(
            f"{where}: `insulate: {given.insulate}` keeps a head that predicts chunks from training the trunk, but here ids "
            "of actions are all that is predicted; set `head: flow`, `l2` or `l1`, or leave `insulate` out"
        )
    if given.horizon and given.horizon < chunk:
        raise DataError(
            f"{where}: a horizon of {given.horizon} is shorter than the chunk of {chunk} steps that are executed; raise "
            "`horizon`, or lower `chunk`"
        )
    if not (head or given.horizon > chunk):
        return
    if encoding.paradigm.mask == BOTH:
        raise DataError(
            f"{where}: paradigm {encoding.paradigm.name!r} sees what comes later, so it would see the actions of its `horizon`; "
            "use a causal paradigm, such as bc"
        )
    if encoding.paradigm.views != ONE:
        raise DataError(
            f"{where}: paradigm {encoding.paradigm.name!r} cannot predict chunks; set `head: bins` and no `horizon`"
        )
    if given.head == "bins" or (not head and len(fields) and fields[0].modality != "continuous"):
        raise DataError(
            f"{where}: ids of actions are predicted one after another and are seen by the steps that follow, so their "
            f"`horizon` is the chunk, {chunk}, not {given.horizon}; set `head: l2`, `l1` or `flow`, or leave `horizon` out"
        )
    other = [f.name for f in fields if f.modality != "continuous"]
    if len(fields) > 1 or other:
        raise DataError(
            f"{where}: one head predicts a chunk of one continuous action field, but the task has "
            f"{', '.join(f.name for f in fields)}; give the others `encoding: skip`, or join them when you convert"
        )
    if given.head == "flow" and given.context > _POSITIONS:
        raise DataError(f"{where}: with `head: flow`, `context` is at most {_POSITIONS}, not {given.context}")


def available(encoding: Encoding, field: FieldSpec, codec: Codec) -> str:
    """The field that tells which values of an action can be taken; empty if there is none. Raises DataError if it cannot."""
    given = encoding.option("available", "")
    if not given and encoding.paradigm.views != AGENTS:
        return ""
    masks = [f.name for f in encoding.task.fields if f.name == given or (not given and f.role == "mask")]
    if given and not masks:
        raise DataError(
            f"task {encoding.task.name!r} has no field {given!r}, which `options: {{available: …}}` of the objective names; it "
            f"has {', '.join(f.name for f in encoding.task.fields)}"
        )
    for name in masks:
        values = codec.values[0] if isinstance(codec, Discrete) and codec.tokens == 1 else 0
        if encoding.task.field(name).shape == (values,):
            return name
        if given:
            raise DataError(
                f"{encoding.where(field)}: {name!r} has shape {encoding.task.field(name).shape} (of one agent), but it must tell "
                f"of each value of one discrete action whether it can be taken, so its shape must be "
                f"({values or 'number of values'},)"
            )
    return ""


def _within_unit(low: np.ndarray, high: np.ndarray) -> bool:
    return bool(np.min(low) >= -1 and np.max(high) <= 1)
