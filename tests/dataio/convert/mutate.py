"""Damaged files: bytes flipped, cut, doubled, overwritten; and the same inside of what a checksum or compression guards."""

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


def mutate(name: str, data: bytes, choose: random.Random) -> bytes:
    """A damaged form of a file, by what its name says it is."""
    inside = choose.random() < 0.6
    if inside and name.endswith((".json", ".zarray")):
        return json.dumps(_tree(json.loads(data), choose)).encode()
    if inside and name.endswith(".jsonl"):
        lines = data.splitlines()
        at = choose.randrange(len(lines))
        lines[at] = json.dumps(_tree(json.loads(lines[at]), choose)).encode()
        return b"\n".join(lines)
    if inside and ".tfrecord" in name:
        return _tfrecord(data, choose)
    if inside and name.endswith(".gz"):
        return gzip.compress(_bytes(gzip.decompress(data), choose), 1)
    if inside and name.endswith((".npz", ".zip")):
        return _zip(data, choose)
    return _bytes(data, choose)


def _bytes(data: bytes, choose: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        at = choose.randrange(min(len(out), 512)) if choose.random() < 0.4 else choose.randrange(len(out))
        kind = choose.randrange(7)
        if kind == 0:
            out[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            out[at] = choose.randrange(256)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + choose.randrange(1, 64)]
        elif kind == 4:
            out[at:at] = choose.randbytes(choose.randrange(1, 64))
        elif kind == 5:
            out[at:at] = out[at : at + choose.randrange(1, 256)]
        else:
            width = choose.choice(("<i", "<q", ">i", ">q"))
            limit = 1 << (31 if width[1] == "i" else 63)
            number = choose.choice(_NUMBERS)
            packed = struct.pack(width, max(-limit, min(limit - 1, number)))
            out[at : at + len(packed)] = packed
    return bytes(out)


def _tree(value: Any, choose: random.Random, depth: int = 0) -> Any:
    """The JSON value with one of its parts replaced, removed or doubled."""
    if isinstance(value, dict) and value and (depth < 1 or choose.random() < 0.85):
        key = choose.choice(sorted(value))
        if choose.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _tree(value[key], choose, depth + 1)}
    if isinstance(value, list) and value and choose.random() < 0.8:
        at = choose.randrange(len(value))
        kind = choose.randrange(4)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, value[at]]
        return [*value[:at], _tree(value[at], choose, depth + 1), *value[at + 1 :]]
    if isinstance(value, str) and choose.random() < 0.3:
        return _bytes(value.encode(), choose).decode("utf-8", "replace")
    return choose.choice((*_VALUES, *_NUMBERS))


def _tfrecord(data: bytes, choose: random.Random) -> bytes:
    """The records with one damaged under a right CRC."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + size])
        at += 16 + size
    number = choose.randrange(len(found))
    found[number] = _bytes(found[number], choose)
    return tfrecord(found)


def _zip(data: bytes, choose: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        damaged = choose.choice(names)
        for name in names:
            content = old.read(name)
            new.writestr(name, mutate(name, content, choose) if name == damaged else content)
    return out.getvalue()


def damage(folder: Path, files: dict[str, bytes], choose: random.Random) -> str:
    """Write the files with one of them damaged or missing; returns which, and restores what an earlier call had damaged."""
    name = choose.choice(sorted(files))
    for path, data in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path != name and not (target.exists() and target.read_bytes() == data):
            target.write_bytes(data)
    if choose.random() < 0.02:
        (folder / name).unlink(missing_ok=True)
    else:
        (folder / name).write_bytes(mutate(name, files[name], choose))
    return name
