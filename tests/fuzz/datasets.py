"""Readers of the files of a dataset of Tiphys."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from tests.dataio.convert import mutate
from tests.dataio.making import RICH, random_episode, write
from tests.fuzz.reader import Reader, damaged_bytes, damaged_json
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import arrays, table, tar
from tiphys.dataio.format.document import parse
from tiphys.dataio.format.rows import RowLayout, broken_row
from tiphys.dataio.statistics import Statistics
from tiphys.dataio.upkeep import rebuild


def make(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Every reader by name, made when it is called."""

    def dataset() -> Path:
        url = folder / "dataset"
        if not url.exists():
            rng = np.random.default_rng(0)
            write(
                str(url), [random_episode(RICH, f"e{i}", 3 + i, rng, ["observation.state"]) for i in range(4)], [RICH]
            )
        return url

    def seeds(name: str) -> tuple[bytes, ...]:
        return ((dataset() / name).read_bytes(),)

    return {
        "dataset.json": lambda: Reader(seeds("dataset.json"), damaged_json, lambda data, _: parse(data, "x")),
        "index.parquet": lambda: Reader(seeds("index.parquet"), damaged_parquet, _read_index),
        "statistics.parquet": lambda: Reader(seeds("statistics.parquet"), damaged_parquet, _read_statistics),
        "tar": lambda: Reader((*seeds("shards/000000.tar"), _pax()), _damaged_tar, _read_tar),
        "steps.npy": lambda: Reader((_rows(),), _damaged_rows, _read_rows),
    }


# -- Parquet ----------------------------------------------------------------------------------------------------------


def damaged_parquet(data: bytes, rng: random.Random) -> bytes:
    """Bytes are changed, or values within a file that is otherwise intact."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    source = pq.ParquetFile(io.BytesIO(data))
    content, metadata = source.read(), source.metadata.metadata or {}
    column = rng.choice(content.schema.names)
    try:
        values = mutate.tree(content[column].to_pylist(), rng)
        made = pa.array(values, content.schema.field(column).type if rng.random() < 0.8 else None)
        pq.write_table(pa.table({column: made}), io.BytesIO())  # Parquet has no struct without fields
        content = content.set_column(content.schema.names.index(column), column, made)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
        content = content.drop_columns([column])
    out = io.BytesIO()
    with pq.ParquetWriter(out, content.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(content)
        if b"tiphys" in metadata:
            text = metadata[b"tiphys"] if rng.random() < 0.7 else damaged_json(metadata[b"tiphys"], rng)
            writer.add_key_value_metadata({"tiphys": text, "tiphys.crc32c": str(crc32c(text))})
    return out.getvalue()


def _read_index(data: bytes, folder: Path) -> None:
    file = folder / "index.parquet"
    file.write_bytes(data)
    tasks, shards = table.read_tasks_and_shards(file)
    found = arrays.decode(file, None, [t.name for t in tasks], [s.name for s in shards])
    arrays.check(found, tasks, shards, "x")


def _read_statistics(data: bytes, folder: Path) -> None:
    from tiphys.dataio.format.limited import read_statistics

    file = folder / "statistics.parquet"
    file.write_bytes(data)
    found, merged = read_statistics(file, "x"), Statistics()
    merged.merge(found)
    merged.merge(read_statistics(file, "x"))
    for fields in merged.result(["rich"]).values():
        for one in fields.values():
            json.dumps(one.to_dict())


# -- Shards -----------------------------------------------------------------------------------------------------------


def _pax() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name in ("é" * 60 + ".txt", "a" * 200 + ".json"):
            info = tarfile.TarInfo(name)
            info.size = 5
            made.addfile(info, io.BytesIO(b"hello"))
    return out.getvalue()


def _damaged_tar(data: bytes, rng: random.Random) -> bytes:
    """Bytes are changed, mostly in headers, whose checksums are mostly made valid again."""
    out = bytearray(damaged_bytes(data, rng) if rng.random() < 0.2 else data)
    blocks = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 3))):
        if not blocks:
            break
        at = rng.choice(blocks)
        kind = rng.randrange(4)
        if kind == 0:
            out[at + 124 : at + 136] = rng.choice(
                (b"77777777777\0", b"-0000000100\0", b"\xff" * 12, b"\x80" + rng.randbytes(11))
            )
        elif kind == 1:
            out[at + 156] = rng.choice(b"0123456789xgLKSDX\0")
        elif kind == 2:
            where = rng.randrange(500)
            out[at + where] = rng.randrange(256)
        else:
            body = b" size=%d\n" % rng.choice((-1536, 0, 1 << 70, 512))
            out[at + 512 : at + 512 + len(body) + 2] = b"%d%s" % (len(body) + 2, body)
        if rng.random() < 0.9:
            header = bytes(out[at : at + 148]) + b" " * 8 + bytes(out[at + 156 : at + 512])
            out[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(out)


def _read_tar(data: bytes, folder: Path) -> None:
    file = folder / "shard.tar"
    file.write_bytes(data)
    for member in tar.members(file):
        assert 0 <= member.offset <= member.offset + member.size <= len(data)
    layouts = {RICH.name: RowLayout(RICH)}
    for _ in rebuild.records(file, "shard.tar", layouts) if data else ():
        pass


def _rows() -> bytes:
    from tiphys.dataio.format.sample import Sample

    episode = random_episode(RICH, "e", 5, np.random.default_rng(0))
    from tiphys.dataio.format.encodings import choose

    layout = RowLayout(RICH)
    return Sample(layout, episode, {f.name: choose(f, {}) for f in layout.large}).members["steps.npy"]


def _damaged_rows(data: bytes, rng: random.Random) -> bytes:
    """Values of rows are changed, and their CRCs with them."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    _, _, header = tar.npy_header(data)
    size = RowLayout(RICH).dtype.itemsize
    out = bytearray(data)
    for at in range(header, len(out), size):
        if rng.random() < 0.5:
            out[at + rng.randrange(size - 4)] = rng.randrange(256)
        out[at + size - 4 : at + size] = crc32c(bytes(out[at : at + size - 4])).to_bytes(4, "little")
    return bytes(out)


def _read_rows(data: bytes, _: Path) -> None:
    dtype, shape, header = tar.npy_header(data)
    layout = RowLayout(RICH)
    if dtype != layout.dtype or len(shape) != 1 or header + shape[0] * dtype.itemsize != len(data):
        raise DataError("not rows")
    if broken_row(memoryview(data)[header:], dtype.itemsize) < 0:
        statistics = Statistics()
        episode: list[Any] = ["e"] if "episode" in Statistics.add.__code__.co_varnames else []
        statistics.add(layout, *episode, np.frombuffer(data, dtype, offset=header))
        statistics.result([RICH.name])
