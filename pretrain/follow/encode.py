"""Deltas: what turns the weights of one training step into those of another, without loss and in few bytes.

Each tensor is written in the smallest of four ways:

    same     nothing: its bytes are those of the base
    sparse   the gaps between the elements that differ, and the differences of these elements
    ulp      the differences of all elements
    whole    the elements themselves

A difference counts representable numbers (units in the last place), and is zigzag-coded. Integers are written in byte planes,
each compressed by zstd. Elements are processed in blocks that fit a core's cache, in threads: NumPy and zstd release the GIL.

    body | JSON: {"version", "tensors": {name: [type, shape, way, [bytes of each part]]}} | length of the JSON (uint64)
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tiphys.dataio.atomic import atomic_file
from tiphys.dataio.episode import DataError
from tiphys.pretrain.follow.weights import Raw, Weights

VERSION = 1
BLOCK = 1 << 17  # elements of a block
SAMPLES = 8  # blocks by which the way of a large tensor is chosen
LEVEL = 1
WAYS = ("same", "sparse", "ulp", "whole")
_LARGEST_INDEX = 256 << 20  # bytes

T = TypeVar("T")
R = TypeVar("R")


class DeltaError(DataError):
    """A delta cannot be applied: it is damaged, or does not belong to these weights."""


def encode(base: Weights, new: Weights, to: str | Path, threads: int = 0) -> int:
    """Write the delta between two weights to a file.

    Parameters
    ----------
    base, new : Weights
        Of the same model.
    to : str or Path
        The file.
    threads : int
        0: one for each core.

    Returns
    -------
    int
        Bytes of the file.

    Raises
    ------
    DataError
        If the names, types or shapes differ.
    """
    _same_model(base, new)
    index: dict[str, Any] = {}
    with atomic_file(Path(to)) as file, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        pairs = [(name, base.tensors[name], tensor) for name, tensor in new.tensors.items()]
        ways = _in_order(pool, lambda pair: choose(pair[1], pair[2]), pairs)
        jobs: list[tuple[str, str, Raw, Raw, int]] = []
        for (name, old, tensor), way in zip(pairs, ways, strict=True):
            index[name] = [tensor.dtype, list(tensor.shape), way, []]
            if way != "same":
                jobs += [(name, way, old, tensor, start) for start in range(0, len(tensor.elements()), BLOCK)]
        for job, parts in zip(jobs, _in_order(pool, lambda job: encode_block(*job[1:]), jobs), strict=True):
            for part in parts:
                file.write(part)
                index[job[0]][3].append(len(part))
        text = json.dumps({"version": VERSION, "tensors": index}, separators=(",", ":")).encode()
        file.write(text + struct.pack("<Q", len(text)))
        return file.tell()


def apply(base: Weights, delta: str | Path, step: int = 0, threads: int = 0) -> Weights:
    """The weights that a delta makes of a base, in new memory.

    Raises DeltaError if the delta is damaged or does not fit the base. Compare the digest of the result: a delta of another base
    may fit too.
    """
    path = Path(delta)
    index, data = _opened(path)
    if list(index) != list(base.tensors):
        raise DeltaError(f"{path}: the delta has other tensors than the weights that it is applied to")
    jobs: list[tuple[str, Raw, np.ndarray, int, list[Any]]] = []
    out, at = {}, 0
    for name, (dtype, shape, way, sizes) in index.items():
        old = base.tensors[name]
        if (dtype, tuple(shape)) != (old.dtype, old.shape):
            raise DeltaError(f"{path}: tensor {name!r} has another type or shape than the weights")
        if way == "same":
            out[name] = old
            continue
        new = np.empty_like(old.data)
        out[name] = Raw(old.dtype, old.shape, new)
        elements, each = new.view(f"<u{old.width}"), _parts(way, old.width)
        starts = range(0, len(elements), BLOCK)
        if len(sizes) != each * len(starts):
            raise DeltaError(f"{path}: tensor {name!r} has {len(sizes)} parts instead of {each * len(starts)}")
        for number, start in enumerate(starts):
            parts = []
            for size in sizes[number * each : (number + 1) * each]:
                parts.append(data[at : at + size])
                at += size
            jobs.append((way, old, elements, start, parts))
    if at != len(data):
        raise DeltaError(f"{path}: the parts have {at} bytes, the file has {len(data)}")
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            deque(_in_order(pool, lambda job: decode_block(*job), jobs), maxlen=0)
        except (OSError, ValueError, IndexError) as error:
            raise DeltaError(f"{path}: the delta is damaged ({error})") from None
    return Weights(out, step)


def _opened(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The index of a delta, and its body. Raises DeltaError."""
    size = path.stat().st_size
    if size < 8:
        raise DeltaError(f"{path}: a delta has more than {size} bytes")
    data = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[-8:].tobytes())
    if length > min(size - 8, _LARGEST_INDEX):
        raise DeltaError(f"{path}: its last 8 bytes say that the index has {length} bytes; the file has {size}")
    try:
        document = json.loads(data[size - 8 - length : size - 8].tobytes())
        version, tensors = document["version"], document["tensors"]
        valid = all(
            isinstance(shape, list)
            and way in WAYS
            and isinstance(sizes, list)
            and all(type(n) is int and n >= 0 for n in sizes)
            for _, shape, way, sizes in tensors.values()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DeltaError(f"{path}: its index, bytes {size - 8 - length}–{size - 8}, is damaged") from None
    if version != VERSION:
        raise DeltaError(f"{path}: has version {version!r}, this Tiphys reads {VERSION}; update Tiphys")
    if not valid:
        raise DeltaError(f"{path}: its index, bytes {size - 8 - length}–{size - 8}, is damaged")
    return tensors, data[: size - 8 - length]


def _same_model(base: Weights, new: Weights) -> None:
    for name in sorted(base.tensors.keys() | new.tensors.keys()):
        old, tensor = base.tensors.get(name), new.tensors.get(name)
        if old is None or tensor is None or old[:2] != tensor[:2]:
            raise DataError(f"tensor {name!r}: the two policies have different models, so there is no delta")


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Like `pool.map`, but only a few results wait."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 4 * pool._max_workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# -- one tensor -------------------------------------------------------------------------------------------------------


def choose(base: Raw, new: Raw) -> str:
    """The way that writes a tensor in the fewest bytes: exactly for a small one, by a sample of blocks for a large one."""
    if np.array_equal(base.data, new.data):
        return "same"
    blocks = -(-len(new.elements()) // BLOCK)
    chosen = sorted({round(i * (blocks - 1) / max(1, min(blocks, SAMPLES) - 1)) for i in range(min(blocks, SAMPLES))})
    sizes = {
        way: sum(len(part) for block in chosen for part in encode_block(way, base, new, block * BLOCK))
        for way in ("sparse", "ulp", "whole")
        if way != "sparse" or _few_differ(base, new, chosen)
    }
    return min(sizes, key=lambda way: (sizes[way], way))


def _few_differ(base: Raw, new: Raw, blocks: Sequence[int]) -> bool:
    """Whether at most half of the elements differ. Otherwise gaps cost more than they save."""
    parts = [slice(block * BLOCK, (block + 1) * BLOCK) for block in blocks]
    differ = [np.count_nonzero(base.elements()[part] != new.elements()[part]) for part in parts]
    return bool(2 * sum(differ) <= sum(len(new.elements()[part]) for part in parts))


def encode_block(way: str, base: Raw, new: Raw, start: int) -> list[bytes]:
    """The parts of the block that begins at an element."""
    mine = new.elements()[start : start + BLOCK]
    if way == "whole":
        return _planes(mine)
    old = base.elements()[start : start + BLOCK]
    if way == "ulp":
        return _planes(_difference(old, mine, new.floating))
    places = np.flatnonzero(old != mine)
    gaps = np.diff(places, prepend=-1).astype("<u4") - 1
    differences = _difference(old[places], mine[places], new.floating)
    return [struct.pack("<I", len(places)), *_planes(gaps), *_planes(differences)]


def decode_block(way: str, base: Raw, out: np.ndarray, start: int, parts: Sequence[Any]) -> None:
    """Write a block into `out`, the elements of the new tensor."""
    mine = out[start : start + BLOCK]
    if way == "whole":
        mine[:] = _joined(parts, len(mine), base.width)
        return
    old = base.elements()[start : start + BLOCK]
    if way == "ulp":
        mine[:] = _moved(old, _joined(parts, len(mine), base.width), base.floating)
        return
    (count,) = struct.unpack("<I", bytes(parts[0]))
    if count > len(mine):
        raise ValueError(f"{count} of {len(mine)} elements differ")
    places = np.cumsum(_joined(parts[1:5], count, 4).astype(np.int64) + 1) - 1
    if count and places[-1] >= len(mine):
        raise ValueError("an element lies outside its block")
    mine[:] = old
    mine[places] = _moved(old[places], _joined(parts[5:], count, base.width), base.floating)


def _parts(way: str, width: int) -> int:
    """Parts of a block."""
    return 1 + 4 + width if way == "sparse" else width


# -- numbers ----------------------------------------------------------------------------------------------------------


def _difference(base: np.ndarray, new: np.ndarray, floating: bool) -> np.ndarray:
    """Zigzag-coded difference of the numbers of two elements: 0, −1, 1, −2, … -> 0, 1, 2, 3, …"""
    if floating:
        base, new = _ordered(base), _ordered(new)
    signed = (new - base).view(f"<i{new.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * new.itemsize - 1))).view(new.dtype)


def _moved(base: np.ndarray, coded: np.ndarray, floating: bool) -> np.ndarray:
    """The elements that lie zigzag-coded differences away."""
    one = coded.dtype.type(1)
    difference = (coded >> one) ^ (coded & one) * coded.dtype.type(np.iinfo(coded.dtype).max)
    return _bits(_ordered(base) + difference) if floating else base + difference


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Bits of floats -> unsigned integers in the order of the floats, so that neighbours differ by 1."""
    last = 8 * bits.itemsize - 1
    negative = (bits.view(f"<i{bits.itemsize}") >> last).view(bits.dtype)
    return bits ^ (negative | bits.dtype.type(1 << last))


def _bits(ordered: np.ndarray) -> np.ndarray:
    """The inverse of `_ordered`."""
    last = 8 * ordered.itemsize - 1
    negative = ~(ordered.view(f"<i{ordered.itemsize}") >> last).view(ordered.dtype)
    return ordered ^ (negative | ordered.dtype.type(1 << last))


def _planes(values: np.ndarray) -> list[bytes]:
    """Unsigned integers -> one part for each of their bytes, the lowest first."""
    if not len(values):
        return [b""] * values.itemsize
    zstd = _codec()
    of = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize)
    parts = []
    for byte in range(values.itemsize):
        plane = np.ascontiguousarray(of[:, byte])
        packed = zstd.compress(plane, asbytes=True)
        parts.append(packed if len(packed) < len(plane) else plane.tobytes())
    return parts


def _joined(parts: Sequence[Any], count: int, width: int) -> np.ndarray:
    """The inverse of `_planes`. A part of `count` bytes is not compressed. Raises ValueError if a part has another length."""
    out = np.empty((count, width), np.uint8)
    zstd = _codec()
    for byte, part in enumerate(parts) if count else ():
        plane = part if len(part) == count else zstd.decompress(part, decompressed_size=count)
        if len(plane) != count:
            raise ValueError(f"a part has {len(plane)} bytes instead of {count}")
        out[:, byte] = np.frombuffer(plane, np.uint8)
    return out.reshape(-1).view(f"<u{width}")


def _codec() -> Any:
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=LEVEL)
