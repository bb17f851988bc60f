"""Readers of videos that stay in files of others: tables of an MP4, samples, the index of such a dataset, and its source."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.dataio.convert import mutate
from tests.dataio.inplace.made import source
from tests.fuzz.datasets import damaged_parquet
from tests.fuzz.reader import Reader, damaged_bytes, files_of, packed, unpacked, write_files
from tiphys.dataio.convert import process
from tiphys.dataio.format import arrays, packets, table
from tiphys.dataio.format.document import parse
from tiphys.dataio.format.mp4 import gops, read_track
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace import build
from tiphys.dataio.storage import StoreError

CAMERA = "observation.images.top"


def make(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Every reader by name, made when it is called."""
    clips = tuple(p.read_bytes() for p in sorted(_VIDEOS.glob("*.mp4")))
    return {
        "mp4": lambda: Reader(clips, _moov, _read_mp4),
        "samples": lambda: Reader(clips, damaged_bytes, _read_samples),
        "packets": lambda: _packets(folder),
        "lerobot": lambda: _lerobot(folder),
    }


_VIDEOS = Path(__file__).parent.parent / "dataio" / "format" / "data"


def _moov(data: bytes, rng: random.Random) -> bytes:
    """Some bytes of the tables are others, often those of a number; or parts of the file are."""
    if rng.random() < 0.2:
        return damaged_bytes(data, rng)
    out, begin = bytearray(data), data.index(b"moov")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(begin, len(out) - 4)
        out[at : at + 4] = rng.choice(
            [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", rng.randbytes(4)]
        )
    return bytes(out)


def _read_mp4(data: bytes, _: Path) -> Any:
    found = read_track(lambda offset, size: data[offset : offset + size], len(data), "x")
    cut = gops(found)
    assert int((found.offsets + found.sizes).max()) <= len(data)
    assert int((cut.last - cut.first).sum()) == len(found)
    return found


def _read_samples(data: bytes, folder: Path) -> None:
    found = _read_mp4(data, folder)
    samples = [data[o : o + s] for o, s in zip(found.offsets.tolist(), found.sizes.tolist(), strict=True)]
    packets.decode(found.stream, samples, found.rank, found.rank[:3])


def _robot(folder: Path) -> Path:
    """A LeRobot dataset of two cameras."""
    made = folder / "robot"
    return made if made.exists() else source(made)


def _packets(folder: Path) -> Reader:
    """The index of videos that stay where they are. What is not refused is decoded."""
    known = build.index_lerobot(str(_robot(folder)), str(folder / "indexed"))
    document = parse((folder / "indexed" / "dataset.json").read_bytes(), "x")

    def read(data: bytes, empty: Path) -> None:
        file = empty / "index.parquet"
        file.write_bytes(data)
        tasks, shards = table.read_tasks_and_shards(file)
        found = arrays.decode(file, None, [t.name for t in tasks], [s.name for s in shards])
        arrays.check(found, tasks, shards, "x")
        index = EpisodeIndex(known.url, {**document, "tasks": tasks, "shards": shards}, found, "x")
        for episode in range(index.episodes):
            task = index.tasks[int(index.task[episode])]
            if CAMERA not in [f.name for f in task.fields]:
                continue
            names, rows = ("action", CAMERA), min(2, int(index.steps[episode]))
            got = index.decode(episode, 0, rows, names, index.read(index.ranges(episode, 0, rows, names)))
            assert got["fields"][CAMERA].shape[0] == rows

    return Reader(((folder / "indexed" / "index.parquet").read_bytes(),), damaged_parquet, read, (*_REFUSED,))


def _lerobot(folder: Path) -> Reader:
    """A LeRobot dataset that is indexed where it is. One reader process serves all inputs."""
    seed = packed(files_of(_robot(folder)))
    readers: dict[str, _Kept] = {}

    def damage(data: bytes, rng: random.Random) -> bytes:
        files = unpacked(data)
        name = rng.choice(sorted(files))
        if name.endswith(".mp4"):
            files[name] = _moov(files[name], rng)
        elif name.endswith(".parquet") and rng.random() < 0.7:
            files[name] = damaged_parquet(files[name], rng)
        else:
            files[name] = mutate.mutate(name, files[name], rng)
        return packed(files)

    def kept(url: str, target: str) -> process.Reader:
        return readers.setdefault(url, _Kept(url, target))

    def read(data: bytes, empty: Path) -> None:
        robot = write_files(unpacked(data), empty / "robot")
        with mock.patch.object(build, "Reader", kept):
            index = build.index_lerobot(str(robot), str(empty / "indexed"), build.IndexOptions(skip_bad=True))
        for episode in range(index.episodes):
            names = [f.name for f in index.tasks[int(index.task[episode])].fields]
            index.read(index.ranges(episode, 0, 1, names))

    return Reader((seed,), damage, read, (*_REFUSED,))


_REFUSED = (build.DataError, StoreError)


class _Kept(process.Reader):
    """A reader process that outlives its `with` block."""

    def __exit__(self, *exc: object) -> None:
        pass
