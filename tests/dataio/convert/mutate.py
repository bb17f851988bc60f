"""Damaged files: bytes flipped, removed, repeated or overwritten, also inside compressed or checksummed data."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

from tests.dataio.convert.convert_sources import tfrecord

_NUMBERS = (0, 1, -1, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 2**40)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**62,
    1e308,
    float("nan"),
    "",
    "x",
    "../../x",
    "{a}",
    [],
    {},
    [[]],
    [1, 2, 3],
    {"a": 1},
)


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a file. The suffix of its name decides which damage is possible."""
    inside = rng.random() < 0.6
    if inside and name.endswith((".json", ".zarray")):
        return json.dumps(tree(json.loads(data), rng)).encode()
    if inside and name.endswith(".jsonl"):
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(tree(json.loads(lines[at]), rng)).encode()
        return b"\n".join(lines)
    if inside and ".tfrecord" in name:
        return _tfrecord(data, rng)
    if inside and name.endswith(".gz"):
        return gzip.compress(flipped(gzip.decompress(data), rng), 1)
    if inside and name.endswith((".npz", ".zip")):
        return _zip(data, rng)
    return flipped(data, rng)


def flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        at = rng.randrange(min(len(out), 512)) if rng.random() < 0.4 else rng.randrange(len(out))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 5:
            out[at:at] = out[at : at + rng.randrange(1, 256)]
        else:
            width = rng.choice(("<i", "<q", ">i", ">q"))
            limit = 1 << (31 if width[1] == "i" else 63)
            number = rng.choice(_NUMBERS)
            packed = struct.pack(width, max(-limit, min(limit - 1, number)))
            out[at : at + len(packed)] = packed
    return bytes(out)


def tree(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """The JSON value with one of its parts replaced, removed or repeated."""
    if isinstance(value, dict) and value and (depth < 1 or rng.random() < 0.85):
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: tree(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        kind = rng.randrange(4)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, value[at]]
        return [*value[:at], tree(value[at], rng, depth + 1), *value[at + 1 :]]
    if isinstance(value, str) and rng.random() < 0.3:
        return flipped(value.encode(), rng).decode("utf-8", "replace")
    return rng.choice((*_VALUES, *_NUMBERS))


def _tfrecord(data: bytes, rng: random.Random) -> bytes:
    """The file with one record damaged and a CRC that matches the damage."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + size])
        at += 16 + size
    number = rng.randrange(len(found))
    found[number] = flipped(found[number], rng)
    return tfrecord(found)


def _zip(data: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        damaged = rng.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, mutate(name, content, rng) if name == damaged else content)
    return out.getvalue()


def damage(folder: Path, files: dict[str, bytes], rng: random.Random) -> str:
    """Write the files with one of them damaged or missing, and return its name. Damage of earlier calls is undone."""
    name = rng.choice(sorted(files))
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path != name and not (target.exists() and target.read_bytes() == data):
            target.write_bytes(data)
    if rng.random() < 0.02:
        (folder / name).unlink(missing_ok=True)
    else:
        (folder / name).write_bytes(mutate(name, files[name], rng))
    return name
