"""One other library over the same episodes and the same store. It runs in `.venv-benchmarks` and imports nothing of Tiphys.

    python worker.py write LIBRARY EPISODES SETTINGS    # the episodes in the library's own format, into the store's folder
    python worker.py read LIBRARY EPISODES SETTINGS     # windows of them, through the store; prints JSON

EPISODES is a folder with `lengths.npy`, `FIELD.npy` (the steps of all episodes, one after the other) and `windows.npy` (episode
and start of each window, in the order in which they are read). Every library must return the same: for each field, an array of
a step's windows, one after the other. SETTINGS is a JSON file: see `other_libraries.py`.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

K = 20
Batch = tuple[dict[str, np.ndarray], np.ndarray]  # fields of a step's windows; the episode of each window


class Episodes:
    """The data, as arrays mapped from disk."""

    def __init__(self, folder: Path) -> None:
        self.lengths = np.load(folder / "lengths.npy")
        self.first = np.concatenate([[0], np.cumsum(self.lengths)])
        self.windows = np.load(folder / "windows.npy")
        names = [f.stem for f in sorted(folder.glob("*.npy")) if f.stem not in ("lengths", "windows")]
        self.fields = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}

    def __getitem__(self, episode: int) -> dict[str, np.ndarray]:
        here = slice(int(self.first[episode]), int(self.first[episode + 1]))
        return {name: np.array(values[here]) for name, values in self.fields.items()}

    def tiles(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(episode, its steps) of windows that are cut in advance, for libraries that can only read whole samples."""
        for episode in range(len(self.lengths)):
            whole = self[episode]
            for start in range(0, int(self.lengths[episode]) - K + 1, K):
                yield episode, {name: values[start : start + K] for name, values in whole.items()}

    @property
    def row_bytes(self) -> int:
        return sum(int(np.prod(v.shape[1:], dtype=int)) * v.dtype.itemsize for v in self.fields.values())


def stacked(windows: list[dict[str, Any]], names: list[str]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([window[name] for window in windows]) for name in names}


def _plain(name: str) -> str:
    """A field's name without dots, for formats in which dots have a meaning."""
    return name.replace(".", "_")


class Library:
    """`write` makes the library's own files; `steps` reads them through the store."""

    def __init__(self, episodes: Episodes, settings: dict[str, Any]) -> None:
        self.episodes, self.settings = episodes, settings
        self.url, self.rows, self.cache = settings["url"], settings["rows"], settings["cache"]

    def write(self, folder: Path) -> None:
        raise NotImplementedError

    def steps(self) -> Iterator[Batch]:
        raise NotImplementedError


class Lance(Library):
    """A row for each step of an episode. One `take` of all rows of a training step's windows, two steps ahead, in threads.

    128 threads of I/O, as its performance guide recommends for object stores; metadata is cached.
    """

    def write(self, folder: Path) -> None:
        import lance
        import pyarrow as pa

        columns = {}
        for name, values in self.episodes.fields.items():
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            width = int(np.prod(values.shape[1:], dtype=int))
            columns[_plain(name)] = pa.FixedSizeListArray.from_arrays(flat, width) if values.ndim > 1 else flat
        lance.write_dataset(pa.table(columns), str(folder))

    def steps(self) -> Iterator[Batch]:
        from concurrent.futures import ThreadPoolExecutor

        os.environ["LANCE_IO_THREADS"] = "128"
        import lance

        data, episodes, rows = lance.dataset(self.url, version=1), self.episodes, self.rows
        shapes = {name: values.shape[1:] for name, values in episodes.fields.items()}

        def take(step: int) -> Batch:
            chosen = episodes.windows[step * rows : (step + 1) * rows]
            wanted = (episodes.first[chosen[:, 0]] + chosen[:, 1])[:, None] + np.arange(K)
            table = data.take(wanted.ravel())
            out = {}
            for name, shape in shapes.items():
                column = table.column(_plain(name)).combine_chunks()
                flat = column.flatten() if shape else column
                out[name] = flat.to_numpy(zero_copy_only=False).reshape(-1, *shape)
            return out, chosen[:, 0]

        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(take, step) for step in range(3)]
            for step in range(3, len(episodes.windows) // rows):
                yield waiting.pop(0).result()
                waiting.append(pool.submit(take, step))


class LitData(Library):
    """A record for each episode, in its layout for time windows, with all fields in one group: one range request for each
    window, 128 in flight."""

    def write(self, folder: Path) -> None:
        from litdata import TemporalArrayLoader, optimize

        optimize(
            fn=self.episodes.__getitem__,
            inputs=list(range(len(self.episodes.lengths))),
            output_dir=str(folder),
            chunk_bytes=64 << 20,
            num_workers=1,
            item_loader=TemporalArrayLoader([list(self.episodes.fields)]),
        )

    def steps(self) -> Iterator[Batch]:
        import asyncio

        from litdata import StreamingDataset, TemporalArrayLoader
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the benchmark's store has no TLS
        data, names = StreamingDataset(self.url, item_loader=TemporalArrayLoader()), list(self.episodes.fields)
        loop, windows, rows = asyncio.new_event_loop(), self.episodes.windows, self.rows
        flying = asyncio.Semaphore(128)

        async def one(episode: int, start: int) -> dict[str, Any]:
            async with flying:
                return await data.aread_window(episode, start, K)

        async def fetch(step: int) -> list[dict[str, Any]]:
            chosen = windows[step * rows : (step + 1) * rows].tolist()
            return list(await asyncio.gather(*(one(*window) for window in chosen)))

        waiting = [loop.create_task(fetch(step)) for step in range(4)]
        for step in range(4, len(windows) // rows):
            found = loop.run_until_complete(waiting.pop(0))
            waiting.append(loop.create_task(fetch(step)))
            yield stacked(found, names), windows[(step - 4) * rows : (step - 3) * rows, 0]


class Tiles(Library):
    """Samples are windows that are cut in advance. Only their order is left to choose."""

    def samples(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        raise NotImplementedError

    def steps(self) -> Iterator[Batch]:
        names, samples = list(self.episodes.fields), self.samples()
        while True:
            some = [next(samples) for _ in range(self.rows)]
            yield stacked([window for _, window in some], names), np.array([episode for episode, _ in some])


class Streaming(Tiles):
    """Small MDS shards, shuffled by its default algorithm in blocks of half the cache, so that a block's shards fit the cache."""

    shuffle = True

    def write(self, folder: Path) -> None:
        MDSWriter = _streaming().MDSWriter
        columns = {
            name: f"ndarray:{v.dtype}:{','.join(map(str, (K, *v.shape[1:])))}"
            for name, v in self.episodes.fields.items()
        }
        with MDSWriter(
            out=str(folder), columns={"episode": "int", **columns}, size_limit=self.settings["shard_bytes"]
        ) as writer:
            for episode, tile in self.episodes.tiles():
                writer.write({"episode": episode, **tile})

    def samples(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        import tempfile

        with tempfile.TemporaryDirectory() as local:
            data = _streaming().StreamingDataset(
                remote=self.url,
                local=local,
                cache_limit=self.cache,
                shuffle=self.shuffle,
                batch_size=self.rows,
                num_canonical_nodes=1,
                shuffle_block_size=self.cache // 2 // (K * self.episodes.row_bytes),
            )
            yield from self.order(data)

    def order(self, data: Any) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        while True:
            for sample in data:
                yield sample["episode"], sample


class StreamingRandom(Streaming):
    """The same shards, read at uniformly random places."""

    shuffle = False

    def order(self, data: Any) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        random = np.random.default_rng(0)
        while True:
            sample = data[int(random.integers(len(data)))]
            yield sample["episode"], sample


class WebDataset(Tiles):
    """Small tars, in a new order in each pass, through a shuffle buffer as large as the cache.

    A window is one structured array. As separate arrays, small fields would double the bytes (headers and padding of a tar).
    """

    def write(self, folder: Path) -> None:
        import webdataset

        fields = self.episodes.fields.items()
        row = np.dtype([(_plain(name), v.dtype, v.shape[1:]) for name, v in fields])
        with webdataset.ShardWriter(
            str(folder / "%06d.tar"), maxsize=self.settings["shard_bytes"], verbose=0
        ) as writer:
            for number, (episode, tile) in enumerate(self.episodes.tiles()):
                steps = np.empty(K, row)
                for name, values in tile.items():
                    steps[_plain(name)] = values
                writer.write({"__key__": f"{number:09d}-{episode}", "npy": steps})

    def samples(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        import webdataset

        names, shards = list(self.episodes.fields), self.settings["shards"]
        address = self.url.replace("s3:/", os.environ["AWS_ENDPOINT_URL"]) + f"/{{000000..{shards - 1:06d}}}.tar"
        buffer = self.cache // (K * self.episodes.row_bytes)
        data = webdataset.WebDataset(address, shardshuffle=shards, seed=0)
        for sample in data.repeat().shuffle(buffer, initial=buffer).decode():
            steps = sample["npy"]
            yield int(sample["__key__"].split("-")[1]), {name: steps[_plain(name)] for name in names}


LIBRARIES: dict[str, Any] = {
    "lance": Lance, "litdata": LitData, "streaming": Streaming, "streaming, random access": StreamingRandom,
    "webdataset": WebDataset,
}  # fmt: skip


def _streaming() -> Any:
    """Import mosaicml-streaming without torchvision, which it needs only for image datasets that are not used here."""
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module: Any = sys.modules.setdefault(name, ModuleType(name))
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        module.VisionDataset, module.to_tensor = object, None
    import streaming

    return streaming


def processor_seconds() -> float:
    """Processor time of this process with all its threads, and of its child processes that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def counts() -> int:
    """Body bytes that the store has sent."""
    with urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/-counts", timeout=5) as answer:
        return int(float(answer.read().split()[1]))


def measure(library: Any, episodes: Episodes, settings: dict[str, Any]) -> dict[str, Any]:
    steps, span = library.steps(), settings["span"]
    done, speeds, processor, fetched, seen = 0, [], [], [], []
    began = time.monotonic()
    while done < settings["settle"] and time.monotonic() < began + settings["seconds"]:
        done += len(next(steps)[1])
    for _ in range(settings["repeat"]):
        began, used, sent, windows = time.monotonic(), processor_seconds(), counts(), 0
        while windows < span and time.monotonic() < began + settings["seconds"]:
            arrays, episode = next(steps)
            if any(len(v) != K * len(episode) for v in arrays.values()):
                raise RuntimeError(f"a window is incomplete: { ({n: v.shape for n, v in arrays.items()}) }")
            windows += len(episode)
            seen.append(episode)
        speeds.append(windows / (time.monotonic() - began))
        processor.append((processor_seconds() - used) / windows * 1000)
        fetched.append((counts() - sent) / (windows * K * episodes.row_bytes))
    stream = np.concatenate(seen)
    distinct = [len(np.unique(stream[i : i + 256])) / 256 for i in range(0, len(stream) - 255, 256)]
    return {
        "windows_per_second": statistics.median(speeds),
        "cpu_per_1000": statistics.median(processor),
        "fetched_over_delivered": statistics.median(fetched),
        "distinct": float(np.mean(distinct)) if distinct else float("nan"),
        "windows_of_a_span": windows,
        "spans": settings["repeat"],
    }


def main() -> None:
    action, name, folder, settings_file = sys.argv[1:]
    settings = json.loads(Path(settings_file).read_text())
    episodes = Episodes(Path(folder))
    library = LIBRARIES[name](episodes, settings)
    if action == "write":
        Path(settings["folder"]).mkdir(parents=True)
        library.write(Path(settings["folder"]))
    else:
        print("RESULT " + json.dumps(measure(library, episodes, settings)), flush=True)
    os._exit(0)  # threads of some libraries never end


if __name__ == "__main__":
    main()
