"""TokenBatch -> tensors: real tokens only, window by window, and targets by softmax range.

The model never sees padding. A batch becomes T tokens in *compact order*: windows are sorted (causal, causal with a prefix,
bidirectional; then by length and place in the batch), and the tokens of each window are consecutive. Attention works on ranges
of tokens, everything else on a matrix [T, D]. This is computed in NumPy, where shapes are known, so that the device never waits
for a size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tiphys.dataio.philox import TASK_DROPOUT, uniform32, words
from tiphys.pretrain.model.targets import no_targets, target_arrays
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.instruction import text_arrays

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

Inputs = dict[str, Tensor]


def to_tensors(
    batch: TokenBatch, device: torch.device | str = "cpu", *, task_dropout: float = 0.0, seed: int = 0
) -> Inputs:
    """The model's inputs, as name -> tensor.

    tokens, local, timestep   int32 [T]
    attributes                int32 [T, 4]: position in the window, modality, task, task + 1 as the router sees it (0: hidden)
    windows                   int32 [W, 3], on the CPU: length of each window, whether it is causal, and the length of its
                              prefix, whose positions see each other (0 if it is bidirectional)
    index                     int64 [T]: row · L + position of each token in the batch (`unpack` reads it)
    embedded/NAME/index       int64 [n]: compact places;  …/value and …/place are those of `Embedded`
    embedded/NAME/text        int64 [n]: the text before each value; texts/… are those of `text_arrays`
    target/I                  int32 [n, 4]: ids for softmax range I (see `targets`)
    regression/NAME           int32 [n, 3 + d]: vectors of d numbers for a head

    `task_dropout` is the share of rows whose task is hidden from the router, drawn by Philox(seed, step, row); 0 outside
    training. A batch of only filler rows becomes one token of modality 0 without a target: it is computed but not counted.
    Raises ValueError if the positions of a segment are not consecutive, or one that is not causal stands behind one that is.
    """
    index, windows = _compact(batch)
    place = np.zeros(batch.tokens.size, np.int64)  # flat position -> compact place
    place[index] = np.arange(len(index))

    route = batch.task + 1
    if task_dropout > 0:
        draw = uniform32(words(seed, batch.step, np.maximum(batch.row, 0), purpose=TASK_DROPOUT)[0])
        route[draw < task_dropout] = 0
    attributes = np.stack([batch.position, batch.modality, batch.task, route], -1).reshape(-1, 4)[index]
    arrays: dict[str, np.ndarray] = {
        "tokens": batch.tokens.reshape(-1)[index],
        "local": batch.local.reshape(-1)[index],
        "timestep": batch.timestep.reshape(-1)[index],
        "attributes": attributes.astype(np.int32),
        "index": index,
    }
    for name, e in batch.embedded.items():
        if len(e.index):
            arrays[f"embedded/{name}/index"] = place[e.index]
            arrays[f"embedded/{name}/value"] = e.value
            arrays[f"embedded/{name}/place"] = e.place.astype(np.int32)
    if any(len(e.index) for e in batch.embedded.values()):
        arrays |= text_arrays(batch, place, len(index))
    arrays |= target_arrays(batch, place)
    out = {name: to_device(torch.from_numpy(np.ascontiguousarray(a)), device) for name, a in arrays.items()}
    out["windows"] = torch.from_numpy(windows)
    return out


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to `device`. CUDA copies asynchronously only from pinned memory."""
    if torch.device(device).type == "cuda" and host.device.type == "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _compact(batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of the real tokens in compact order, and the windows [W, 3]: length, causal flag and prefix."""
    rows, length = batch.tokens.shape
    segment = batch.segment.reshape(-1)
    real = np.flatnonzero(segment > 0)
    if len(real) == 0:
        return np.zeros(min(1, rows * length), np.int64), np.array([[1, 1, 0]][: rows * length], np.int32).reshape(
            -1, 3
        )
    key = real // length << 32 | segment[real]
    first = np.flatnonzero((np.diff(key, prepend=-1) != 0) | (np.diff(real, prepend=-2) != 1))
    size = np.diff(first, append=len(real))
    names, times = np.unique(key[first], return_counts=True)
    if len(names) < len(first):
        torn = int(names[times > 1][0])
        raise ValueError(
            f"step {batch.step}, row {torn >> 32}: the positions of segment {torn & 0xFFFFFFFF} are not consecutive"
        )
    flags = batch.causal.reshape(-1)[real]
    prefix = size - np.add.reduceat(flags, first, dtype=np.int64)  # the first positions, which are not causal
    within = np.arange(len(real)) - np.repeat(first, size)
    if (flags != (within >= np.repeat(prefix, size))).any():
        raise ValueError(f"step {batch.step}: a position of a segment that is not causal stands behind one that is")
    causal = prefix < size
    prefix = np.where(causal, prefix, 0)
    order = np.lexsort((first, size, prefix > 0, ~causal))
    start = np.repeat(real[first[order]], size[order])
    offset = np.arange(len(real)) - np.repeat(np.cumsum(size[order]) - size[order], size[order])
    return start + offset, np.stack([size[order], causal[order], prefix[order]], -1).astype(np.int32)


def scalars(normaliser: Any, tokens: Any, auxiliary_scale: Any, device: torch.device | str) -> Tensor:
    """int32 [3], the bits of float32: divisor of the loss, divisor of the auxiliary losses, scale of the auxiliary gradient.

    The device fills the numbers in; a copy from the host would wait for all work queued on it.
    """
    parts = [
        v.to(device, torch.float32).reshape(1)
        if isinstance(v, Tensor)
        else torch.full((1,), v, dtype=torch.float32, device=device)
        for v in (normaliser, tokens, auxiliary_scale)
    ]
    return torch.cat(parts).view(torch.int32)


def unpack(hidden: Tensor, inputs: Mapping[str, Tensor], rows: int, length: int) -> Tensor:
    """[T, D] in compact order -> [rows, length, D], with zeros at padding."""
    out = hidden.new_zeros(rows * length, hidden.shape[-1])
    return out.index_copy(0, inputs["index"], hidden).view(rows, length, -1)


def missing(name: str, config: DecisionConfig, device: torch.device) -> Tensor:
    """An empty tensor for a name that this batch does not have, with the type and the other dimensions of the name."""
    if (empty := no_targets(name, config, device)) is not None:
        return empty
    kind, _, rest = name.partition("/")
    if kind == "texts":
        return torch.ones(
            rest == "size", dtype=torch.int32 if rest in ("size", "earlier") else torch.int64, device=device
        )
    if kind != "embedded":
        raise KeyError(f"the batch has no {name!r}; make it with to_tensors")
    embedder, key = rest.rsplit("/", 1)
    if key in ("index", "text"):
        return torch.zeros(0, dtype=torch.int64, device=device)
    if key == "place":
        return torch.zeros(0, 2, dtype=torch.int32, device=device)
    return torch.zeros(0, *config.embedders[embedder]["shape"], device=device)
