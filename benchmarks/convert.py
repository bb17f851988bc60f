"""Compares each reader with the format's own library, and measures the memory of a conversion.

    python benchmarks/convert.py [--steps 400] [--only NAMES] [--json FILE] [--memory]

The sources are made at the start, by the formats' own libraries if possible. The figures are megabytes of arrays, as
the library decodes them, per second of CPU time (all threads counted): medians of five rounds in which the two readers
alternate. `--memory` also converts sources of 8, 32 and 128 episodes and shows the largest resident memory of
the converting process and of its reader process.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import tests.dataio.convert.convert_sources as sources
from tiphys.dataio.convert.converter import BUILT_IN, load_converter
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import Episode

ROUNDS = 5


def ours(source: Path, format: str) -> int:
    """Decoded bytes of all episodes."""
    converter = load_converter(BUILT_IN[format])(Source(str(source)))
    total = 0
    for piece in converter.pieces():
        for item in converter.episodes(piece):
            if not isinstance(item, Episode):
                raise RuntimeError(f"{item.where}: {item.reason}")
            total += sum(np.asarray(v).nbytes for v in item.fields.values() if not isinstance(v, str))
    return total


# ---- reading with the format's own library; each function returns the decoded bytes ----------------------------------


def _decoded(path: Path) -> Iterator[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def lerobot(folder: Path) -> int:
    """PyAV and pyarrow, like LeRobot's own `pyav` backend."""
    import pyarrow.parquet as pq

    total = 0
    for path in sorted(folder.rglob("episode_*.parquet")):
        table = pq.read_table(path)
        total += sum(np.array(table.column(c).to_pylist()).nbytes for c in table.column_names)
    for path in sorted(folder.rglob("*.mp4")):
        total += np.stack(list(_decoded(path))).nbytes
    return total


def rlds(folder: Path) -> int:
    """Google's protobuf runtime, which TensorFlow also uses, and Pillow for the images."""
    from PIL import Image

    from tests.dataio.convert.test_convert_real import _protobuf_records

    total = 0
    for path in sorted(folder.glob("*.tfrecord-*")):
        for record in _protobuf_records(path):
            for key, values in record.items():
                if key.endswith("image"):
                    total += np.stack([np.asarray(Image.open(io.BytesIO(v))) for v in values]).nbytes
                elif values and not isinstance(values[0], bytes):
                    total += np.asarray(values, np.float32).nbytes
    return total


def minari(folder: Path) -> int:
    from minari import MinariDataset

    total = 0
    for episode in MinariDataset(next(folder.rglob("metadata.json")).parent).iterate_episodes():
        leaves = [*episode.observations["pair"], *episode.actions, episode.observations["image"], episode.rewards]
        total += sum(np.asarray(v).nbytes for v in leaves)
    return total


def hdf5(folder: Path) -> int:
    import h5py

    total = 0

    def add(_: str, item: Any) -> None:
        nonlocal total
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "biuf":
            total += np.asarray(item[()]).nbytes

    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            file.visititems(add)
    return total


def zarr(folder: Path) -> int:
    import zarr as library

    root = library.open_group(str(folder), mode="r")
    ends = [0, *np.asarray(root["meta/episode_ends"][:]).tolist()]  # type: ignore[index]
    total = 0
    for begin, end in pairwise(ends):
        total += sum(np.asarray(root["data"][k][begin:end]).nbytes for k in ("img", "state", "action"))  # type: ignore[index, misc]
    return total


def npz(folder: Path) -> int:
    total = 0
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            total += sum(file[k].nbytes for k in file.files)
    return total


def webdataset(folder: Path) -> int:
    import webdataset as library

    shards = [str(p) for p in sorted(folder.glob("*.tar"))]
    return sum(s["png"].nbytes for s in library.WebDataset(shards, shardshuffle=False).decode("rgb8"))


def dqn_replay(folder: Path) -> int:
    return sum(np.load(io.BytesIO(gzip.decompress(p.read_bytes()))).nbytes for p in sorted(folder.rglob("*.gz")))


def vpt(folder: Path) -> int:
    total = sum(np.stack(list(_decoded(p))).nbytes for p in sorted(folder.glob("*.mp4")))
    return total + sum(len([json.loads(line) for line in p.read_text().splitlines()]) for p in folder.glob("*.jsonl"))


CASES: dict[str, tuple[str, Callable[[Path], int], str]] = {
    "lerobot-v2": ("lerobot", lerobot, "PyAV + pyarrow"),
    "rlds": ("rlds", rlds, "protobuf + Pillow"),
    "minari-hdf5": ("minari", minari, "minari"),
    "d4rl": ("d4rl", hdf5, "h5py"),
    "robomimic": ("robomimic", hdf5, "h5py"),
    "zarr.zarr": ("zarr", zarr, "zarr"),
    "npz": ("npz", npz, "NumPy"),
    "webdataset": ("webdataset", webdataset, "webdataset"),
    "dqn-replay": ("dqn-replay", dqn_replay, "gzip + NumPy"),
    "vpt": ("vpt", vpt, "PyAV"),
}


_LENGTH_FACTOR = {  # more steps for formats whose rows are small here
    "d4rl": 200,
    "robomimic": 10,
    "zarr.zarr": 10,
    "npz": 10,
    "webdataset": 1,
    "dqn-replay": 2,
}


def seconds(read: Callable[[], int]) -> float:
    """CPU time of this process, all threads counted."""
    begin = time.process_time()
    read()
    return max(time.process_time() - begin, 1e-9)


def compare(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """Speeds of our reader and of the library on one source."""
    format, library, library_name = CASES[name]
    source = folder / name
    sources.LENGTHS = (steps * _LENGTH_FACTOR.get(name, 1),) * 3
    sources.MAKERS[name][1](source)
    our_seconds, library_seconds = [], []
    ours(source, format)  # warm up: imports and the page cache
    size = library(source) / 1e6
    for _ in range(ROUNDS):
        our_seconds.append(seconds(lambda: ours(source, format)))
        library_seconds.append(seconds(lambda: library(source)))
    our_speed, library_speed = size / statistics.median(our_seconds), size / statistics.median(library_seconds)
    return {
        "format": name,
        "library": library_name,
        "MB_per_s": round(our_speed, 1),
        "library_MB_per_s": round(library_speed, 1),
        "ratio": round(our_speed / library_speed, 2),
    }


_CONVERT_AND_PRINT_MEMORY = """
import resource, sys
from tiphys.dataio.convert import convert
if __name__ == "__main__":
    convert(sys.argv[1], sys.argv[2], format="npz", processes=1)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss // 1024)
"""


def memory(folder: Path) -> list[dict[str, Any]]:
    """Largest resident memory (MiB) of a conversion, for sources of 8, 32 and 128 episodes of 8 MB each."""
    out = []
    for times in (1, 4, 16):
        source = folder / f"memory-{times}"
        source.mkdir()
        for number in range(8 * times):
            rows = np.random.default_rng(number).normal(size=(1000, 1000))
            np.savez(source / f"{number:05d}.npz", observations=rows, actions=rows[:, :8])
        command = [sys.executable, "-c", _CONVERT_AND_PRINT_MEMORY, str(source), str(folder / f"out-{times}")]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        size = sum(p.stat().st_size for p in source.iterdir()) >> 20
        out.append({"source_MiB": size, "converter_MiB": int(answer[0]), "reader_MiB": int(answer[1])})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps per episode; some formats get a multiple")
    parser.add_argument("--only", default="", help=f"names of cases, separated by commas; known: {', '.join(CASES)}")
    parser.add_argument("--memory", action="store_true", help="also measure the memory of a conversion")
    parser.add_argument("--json", default="", help="write the results to this file")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {"readers": [], "memory": []}
    with tempfile.TemporaryDirectory(prefix="tiphys-bench-") as scratch:
        folder = Path(scratch)
        for name in args.only.split(",") if args.only else CASES:
            row = compare(folder, name, args.steps)
            result["readers"].append(row)
            print(
                "{format:12} {MB_per_s:9} MB/s   {library:18} {library_MB_per_s:9} MB/s   ratio {ratio}".format(**row),
                flush=True,
            )
        if args.memory:
            result["memory"] = memory(folder)
            for row in result["memory"]:
                print(
                    "source {source_MiB} MiB: converter {converter_MiB} MiB, reader {reader_MiB} MiB".format(**row),
                    flush=True,
                )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
