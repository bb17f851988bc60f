"""The readers of foreign bytes: for each, valid inputs, how one is damaged, how it is read, and which errors are ours."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from crc32c import crc32c

from tests.dataio.convert import mutate
from tests.dataio.making import RICH, random_episode, write
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import arrays, table, tar
from tiphys.dataio.format.document import parse
from tiphys.dataio.format.rows import RowLayout, broken_row
from tiphys.dataio.statistics import Statistics
from tiphys.dataio.upkeep import rebuild

Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """One reader.

    seeds   valid inputs
    damage  a damaged copy of an input
    read    reads an input; the folder is empty and may be written to
    errors  what it may raise
    """

    seeds: tuple[bytes, ...]
    damage: Damage
    read: Callable[[bytes, Path], Any]
    errors: tuple[type[Exception], ...] = (DataError,)


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

    def parquet(name: str, read: Callable[[bytes, Path], Any]) -> Reader:
        return Reader(((dataset() / name).read_bytes(),), _parquet, read)

    return {
        "dataset.json": lambda: Reader(
            ((dataset() / "dataset.json").read_bytes(),), _json, lambda data, _: parse(data, "x")
        ),
        "index.parquet": lambda: parquet("index.parquet", _read_index),
        "statistics.parquet": lambda: parquet("statistics.parquet", _read_statistics),
        "tar": lambda: Reader(((dataset() / "shards/000000.tar").read_bytes(), _pax()), _tar, _read_tar),
        "steps.npy": lambda: Reader((_rows(),), _damaged_rows, _read_rows),
        "processor.json": lambda: Reader((_PROCESSOR.read_bytes(),), _json, _read_processor),
        "config.json": lambda: Reader((_config(),), _json, _read_config),
        "checkpoint": lambda: _checkpoint(folder),
        "recipe": _recipe,
        "mapping": lambda: Reader((_MAPPING,), _yaml, _read_mapping),
        "mp4": lambda: Reader(tuple(p.read_bytes() for p in sorted(_VIDEOS.glob("*.mp4"))), _moov, _read_mp4),
        "samples": lambda: Reader(tuple(p.read_bytes() for p in sorted(_VIDEOS.glob("*.mp4"))), _bytes, _read_samples),
    }


_PROCESSOR = Path(__file__).parent.parent / "pretrain" / "acting" / "data" / "processor.json"


def _bytes(data: bytes, rng: random.Random) -> bytes:
    return mutate.flipped(data, rng)


def _json(data: bytes, rng: random.Random) -> bytes:
    return mutate.mutate("x.json", data, rng)


def _yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return _bytes(data, rng)
    return yaml.safe_dump(mutate.tree(yaml.safe_load(data), rng)).encode()


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(data: bytes, rng: random.Random) -> bytes:
    """Bytes are changed, or values within a file that is otherwise intact."""
    if rng.random() < 0.4:
        return _bytes(data, rng)
    source = pq.ParquetFile(io.BytesIO(data))
    content, metadata = source.read(), source.metadata.metadata or {}
    column = rng.choice(content.schema.names)
    try:
        values = mutate.tree(content[column].to_pylist(), rng)
        made = pa.array(values, content.schema.field(column).type if rng.random() < 0.8 else None)
        content = content.set_column(content.schema.names.index(column), column, made)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
        content = content.drop_columns([column])
    out = io.BytesIO()
    with pq.ParquetWriter(out, content.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(content)
        if b"tiphys" in metadata:
            text = metadata[b"tiphys"] if rng.random() < 0.7 else _json(metadata[b"tiphys"], rng)
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


# -- Videos -----------------------------------------------------------------------------------------------------------

_VIDEOS = Path(__file__).parent.parent / "dataio" / "format" / "data"


def _moov(data: bytes, rng: random.Random) -> bytes:
    """Some bytes of the tables are others, often those of a number; or parts of the file are."""
    if rng.random() < 0.2:
        return _bytes(data, rng)
    out, begin = bytearray(data), data.index(b"moov")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(begin, len(out) - 4)
        out[at : at + 4] = rng.choice(
            [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", rng.randbytes(4)]
        )
    return bytes(out)


def _read_mp4(data: bytes, _: Path) -> Any:
    from tiphys.dataio.format.mp4 import gops, read_track

    found = read_track(lambda offset, size: data[offset : offset + size], len(data), "x")
    cut = gops(found)
    assert int((found.offsets + found.sizes).max()) <= len(data)
    assert int((cut.last - cut.first).sum()) == len(found)
    return found


def _read_samples(data: bytes, folder: Path) -> None:
    from tiphys.dataio.format import packets

    found = _read_mp4(data, folder)
    samples = [data[o : o + s] for o, s in zip(found.offsets.tolist(), found.sizes.tolist(), strict=True)]
    packets.decode(found.stream, samples, found.rank, found.rank[:3])


# -- Shards -----------------------------------------------------------------------------------------------------------


def _pax() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name in ("é" * 60 + ".txt", "a" * 200 + ".json"):
            info = tarfile.TarInfo(name)
            info.size = 5
            made.addfile(info, io.BytesIO(b"hello"))
    return out.getvalue()


def _tar(data: bytes, rng: random.Random) -> bytes:
    """Bytes are changed, mostly in headers, whose checksums are mostly made valid again."""
    out = bytearray(_bytes(data, rng) if rng.random() < 0.2 else data)
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
        return _bytes(data, rng)
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


# -- Policies, checkpoints, recipes -----------------------------------------------------------------------------------


def _read_processor(data: bytes, _: Path) -> None:
    from tiphys.pretrain.acting.processor import Processor

    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("not JSON") from None
    processor = Processor.from_dict(values)
    for objective, by_task in processor.layouts.items():
        for task in by_task:
            if by_task[task].has_actions and task in processor.tasks and task in processor.best_return:
                processor.history(task, 1, objective=objective)


def _config() -> bytes:
    from tiphys.pretrain.model.config import DecisionConfig

    ranges = [["text", 0, 260], ["continuous", 260, 1284]]
    patch = {"kind": "patch", "shape": [16, 16, 3], "values": 0}
    config = DecisionConfig(vocab_size=1284, ranges=ranges, embedders={"patch:3": patch}, tasks=["a"], num_experts=4)
    return config.to_json_string().encode()


def _read_config(data: bytes, _: Path) -> None:
    from tiphys.pretrain.model.config import DecisionConfig

    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("not JSON") from None
    if isinstance(values, dict):  # transformers reads nothing else
        DecisionConfig.from_dict(values)


def _checkpoint(folder: Path) -> Reader:
    import torch

    from tiphys.pretrain import checkpoint_files as files
    from tiphys.pretrain.checkpoint import Checkpoint, Snapshot, export_weights, write

    tensors = {"w@0|master": torch.arange(6.0)}
    index = [{"name": "w", "shape": [2, 3], "start": 0, "numel": 6, "keys": ["master"], "step": 1.0}]
    made = write(Snapshot(1, 0, 1, "s", tensors, index, {"torch": ""}, {"step": 1}), folder / "run")
    names = (files.MANIFEST, "rank00000.json", "rank00000.safetensors")
    seeds = {name: (made / name).read_bytes() for name in names}

    def damage(data: bytes, rng: random.Random) -> bytes:
        return _bytes(data, rng) if data == seeds[names[2]] else _json(data, rng)

    def read(data: bytes, empty: Path) -> None:
        target = empty / made.name
        target.mkdir()
        try:
            old = next(name for name in names if data[:9] == seeds[name][:9])
        except StopIteration:
            old = names[len(data) % 3]
        for path in made.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        (target / old).write_bytes(data)
        if old != files.MANIFEST:  # an attacker writes a manifest that fits
            manifest = json.loads(seeds[files.MANIFEST])
            manifest["files"][old] = files.digest(target / old)
            (target / files.MANIFEST).write_text(json.dumps(manifest))
        found = Checkpoint.open(target)
        found.verify()
        export_weights(found)

    return Reader(tuple(seeds.values()), damage, read, (files.CheckpointError,))


def _recipe() -> Reader:
    from tiphys.recipes.load import FOLDER, RecipeError, load_recipe

    def read(data: bytes, folder: Path) -> None:
        (folder / "r.yaml").write_bytes(data)
        load_recipe(folder / "r.yaml")

    return Reader(tuple(p.read_bytes() for p in sorted(FOLDER.glob("*.yaml"))), _yaml, read, (RecipeError,))


_MAPPING = b"""
task: name
fields:
  state: observation.state
  action: {name: action, role: action, modality: continuous}
"""


def _read_mapping(data: bytes, _: Path) -> None:
    from tiphys.dataio.convert.mapping import Mapping

    Mapping.parse(data.decode("utf-8", "replace"), "x")
