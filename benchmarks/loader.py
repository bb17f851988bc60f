"""Measures the loader beside plain concurrent range requests and beside memory, on vectors and on images, in one run.

    python -m benchmarks.loader [--json FILE] [--repeat 5] [--scale 1.0] [--only vector,image,others,processes,plan,augment]
    python -m benchmarks.loader --soak MINUTES [--pace STEPS_A_SECOND]    # only the loader's memory, over a long time

All methods read the same windows (K = 20 steps, drawn by the same plan, stacked by the same function) of the same datasets. The
store answers after 15 ms, at 80 MB/s for each connection, and shares the machine's cores with what is measured. The cache holds
a quarter of the data. Figures are medians over `--repeat` spans of a steady run; CPU seconds are those of the loader process.

`others` adds other libraries over the same episodes (`other_libraries.py`), `processes` what several processes save together
(`loader_marks.py`), `plan` the costs of planning (`plan.py`), `augment` the rate at which pictures are changed in training.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_marks import eight_nodes, four_homes
from benchmarks.other_libraries import compare_others
from benchmarks.soak import soak, summary
from benchmarks.store import StoreServer
from tiphys.dataio.cache import hit_bound
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec, Window
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.loading.assemble import Assembler
from tiphys.dataio.loading.units import UnitMap
from tiphys.dataio.placement import Home
from tiphys.dataio.sampling import SamplingPlan
from tiphys.dataio.shards import ShardWriter
from tiphys.dataio.storage import Store
from tiphys.launch.loader_bench import all_fields, distinct_bound, stack_windows, window_plan
from tiphys.pretrain.tokens.augment import augmented, draws

K = 20
PARTS = "vector,image,others,processes,plan,augment"
Steps = Iterator[tuple[int, float, dict[str, float]]]  # windows, CPU seconds of the process, the loader's counters
VECTOR = (
    FieldSpec("observation", "observation", "continuous", "float32", (64,)),
    FieldSpec("action", "action", "continuous", "float32", (4,)),
    FieldSpec("reward", "reward", "continuous", "float32"),
)
# Short rows: 55,000 episodes of them take half a gigabyte; for so many episodes the plan chooses 128 buckets
NARROW = (FieldSpec("observation", "observation", "continuous", "float32", (8,)), *VECTOR[1:])
IMAGE = (*VECTOR, FieldSpec("observation.image", "observation", "image", "uint8", (84, 84, 1)))
KINDS = {"vector": (VECTOR, 150 << 20, 256), "image": (IMAGE, 600 << 20, 64)}  # fields, bytes, rows of a step


def write(url: str, fields: tuple[FieldSpec, ...], size: int) -> EpisodeIndex:
    """Write episodes of 20 to 1,000 steps (lognormal around 150) until they have `size` bytes."""
    task, rng, written, number = TaskSpec("t", fields), np.random.default_rng(0), 0, 0
    with ShardWriter(url, [task], encodings={"observation.image": Encoding("raw")}) as writer:
        while written < size:
            steps = int(np.clip(rng.lognormal(5.0, 0.6), K, 1000))
            values: dict[str, Any] = {}
            for field in fields:
                shape = (steps, *field.shape)
                image = field.modality == "image"
                values[field.name] = rng.integers(0, 256, shape, np.uint8) if image else rng.random(shape, np.float32)
            writer.write(Episode(f"{number:07d}", "t", values, steps))
            written += steps * sum(field.bytes_per_step for field in fields)
            number += 1
    return EpisodeIndex.open(url)


# The methods that are compared: each yields one training step after the other


def from_arrays(index: EpisodeIndex, plan: SamplingPlan) -> Steps:
    """Every episode as arrays in memory. A window is a slice; nothing is decoded or verified. Nothing can be faster."""
    from tiphys.dataio.dataset import read_episode

    episodes = [read_episode(index, e) for e in range(index.episodes)]
    for step in range(10**9):
        began = time.process_time()
        planned = plan.windows(step)
        rows: list[list[Window]] = []
        for i in range(len(planned.row)):
            episode, start = episodes[int(planned.episode[i])], int(planned.start[i])
            stop = start + int(planned.units[i])
            fields = {name: value[start:stop] for name, value in episode.fields.items()}
            empty = np.zeros(0)
            window = Window(
                entry=0,
                task=0,
                episode=episode.id,
                start=start,
                steps=stop - start,
                episode_steps=episode.steps,
                fields=fields,
                step=empty,
                returns_to_go=empty,
                valid=empty,
            )
            rows.append([window])
        stack_windows(step, np.arange(len(rows)), rows)
        yield len(rows), time.process_time() - began, {}


def from_memory(index: EpisodeIndex, plan: SamplingPlan) -> Steps:
    """The shards as bytes in memory. A window is cut out, verified and decoded."""
    shards = [index.store.read(index.shard_name(number)) for number in range(len(index.shards))]
    names = all_fields(index).fields
    units = UnitMap([index], [all_fields(index)], 1 << 20)
    assembler = Assembler(units)
    for step in range(10**9):
        began = time.process_time()
        planned = plan.windows(step)
        rows = []
        first, count = units.rows(planned)
        for i in range(len(planned.row)):
            window = int(planned.episode[i]), int(first[i]), int(count[i])
            parts = [shards[r.shard][r.offset : r.offset + r.size] for r in index.ranges(*window, names)]
            decoded = index.decode(*window, names, parts)
            rows.append([assembler.window(planned, i, decoded)])
        stack_windows(step, np.arange(len(rows)), rows)
        yield len(rows), time.process_time() - began, {}


def from_ranges(index: EpisodeIndex, plan: SamplingPlan) -> Steps:
    """One range request for each window and column, 128 in flight, four steps ahead, no cache."""
    needs = all_fields(index)
    units = UnitMap([index], [needs], 1 << 20)  # our decoder, but plain requests
    assembler, store = Assembler(units), Store(index.url, requests=128)
    loop = asyncio.new_event_loop()

    async def window(episode: int, first: int, rows: int) -> list[Any]:
        wanted = index.ranges(episode, first, rows, needs.fields)
        parts = [store.read_ranges_async(index.shard_name(r.shard), [r.offset], [r.size]) for r in wanted]
        return [buffer for (buffer,) in await asyncio.gather(*parts)]

    async def fetch(step: int) -> tuple[Any, list[Any]]:
        planned = plan.windows(step)
        wanted = (a.tolist() for a in (planned.episode, *units.rows(planned)))
        return planned, list(await asyncio.gather(*(window(e, a, n) for e, a, n in zip(*wanted, strict=True))))

    waiting = [loop.create_task(fetch(step)) for step in range(4)]
    try:
        for step in range(10**9):
            began = time.process_time()
            planned, buffers = loop.run_until_complete(waiting.pop(0))
            waiting.append(loop.create_task(fetch(step + 4)))
            rows = []
            first, count = units.rows(planned)
            for i, parts in enumerate(buffers):
                decoded = index.decode(int(planned.episode[i]), int(first[i]), int(count[i]), needs.fields, parts)
                rows.append([assembler.window(planned, i, decoded)])
            stack_windows(step, np.arange(len(rows)), rows)
            yield len(rows), time.process_time() - began, {}
    finally:
        for task in waiting:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*waiting, return_exceptions=True))
        loop.close()


def from_loader(index: EpisodeIndex, plan: SamplingPlan, cache: int, unit_rows: int) -> Steps:
    """The loader in a process of its own. `unit_rows` 0: the loader chooses the rows of a unit."""
    settings = LoaderSettings(cache=CacheBudget(memory=cache), requests=128, unit_rows=unit_rows)
    with TrajectoryLoader(plan, Home(0, 1), stack_windows, [all_fields(index)], settings=settings) as loader:
        for batch in loader:
            counters = batch.counters
            yield int(counters["windows"]), counters["cpu_seconds"], counters
            batch.release()


def measure(steps: Steps, settle: int, span: int, repeat: int) -> dict[str, Any]:
    """Medians over `repeat` spans of `span` windows, after `settle` windows."""
    done, speeds, cpu, counted = 0, [], [], []
    while done < settle:
        done += next(steps)[0]
    for _ in range(repeat):
        began, windows, seconds, total = time.monotonic(), 0, 0.0, dict[str, float]()
        while windows < span:
            count, spent, counters = next(steps)
            windows, seconds = windows + count, seconds + spent
            for name, value in counters.items():
                total[name] = total.get(name, 0.0) + value
            last = counters
        speeds.append(windows / (time.monotonic() - began))
        cpu.append(seconds / windows * 1000)
        counted.append({**total, "last_bound": last.get("cache_hit_bound", 0.0), "steps": float(len(speeds))})
    steps.close()  # type: ignore[attr-defined]
    out: dict[str, Any] = {
        "windows_per_second": statistics.median(speeds), "cpu_per_1000": statistics.median(cpu), "speeds": speeds
    }  # fmt: skip
    if "bytes_delivered" in counted[0]:
        out["fetched_over_delivered"] = statistics.median(c["bytes_store"] / c["bytes_delivered"] for c in counted)
        out["missed_over_delivered"] = statistics.median(c["bytes_missed"] / c["bytes_delivered"] for c in counted)
        out["requests_per_window"] = statistics.median(c["requests"] / c["windows"] for c in counted)
        out["resident_bytes"] = last["resident_bytes"]
        out["memory_bound"] = 1 - last["cache_hit_bound"]
    return out


def compare(kind: str, index: EpisodeIndex, repeat: int) -> dict[str, Any]:
    """The figures of all methods over one dataset."""
    rows = KINDS[kind][2]
    total = index_bytes(index)
    cache, windows = total // 4, int(index.steps.sum()) // K

    def plan(**more: Any) -> SamplingPlan:
        return window_plan(index, rows, K, **more)

    out: dict[str, Any] = {"bytes": total, "cache": cache, "bound": 1 - hit_bound(0.25)}
    others = {"arrays": from_arrays, "memory": from_memory, "ranges": from_ranges}
    for name, method in others.items():
        out[name] = measure(method(index, plan()), rows * 4, max(windows // 8, 4 * rows), repeat)
        print(kind, name, _short(out[name]), flush=True)
    for name, unit_rows in (("loader", 0), ("loader, units of 2 rows", 2)):
        found = measure(from_loader(index, plan(), cache, unit_rows), 3 * windows, windows // 2, repeat)
        found["share_of_memory"] = found["windows_per_second"] / out["memory"]["windows_per_second"]
        out[name] = found
        print(kind, name, _short(found), flush=True)
    for name in others:
        out[name]["share_of_memory"] = out[name]["windows_per_second"] / out["memory"]["windows_per_second"]
    tiles = 22 * windows // 10  # the ends of rows cut tiles in two, so an epoch has about twice as many windows
    epochs = measure(from_loader(index, plan(replacement=False), cache, 0), tiles, tiles // 2, 2)
    out["epochs"] = epochs
    print(kind, "epochs", _short(epochs), flush=True)
    return out


def index_bytes(index: EpisodeIndex) -> int:
    """Bytes of a dataset's fields."""
    return sum(column.total for column in UnitMap([index], [all_fields(index)], 1).columns)


def randomness(index: EpisodeIndex, rows: int) -> dict[str, float]:
    """Distinct episodes in 256 consecutive windows, over the number that independent draws give. The plan chooses the buckets."""
    plan, ratios = window_plan(index, rows, K), []
    stream = np.concatenate([plan.windows(step).episode for step in range(200)])
    for start in range(0, len(stream) - 256, 256):
        ratios.append(len(np.unique(stream[start : start + 256])) / 256)
    return {"distinct_over_uniform": float(np.mean(ratios)) / distinct_bound(index, K), "buckets": plan.buckets}


def waiting(index: EpisodeIndex, rows: int, cache: int) -> dict[str, float]:
    """How long the trainer waits if its step takes 1.2 times as long as the loader's, in a steady run.

    Two passes over the data fill the cache. In a third one the trainer takes every batch as soon as it is finished: this gives
    the loader's time for a step. In a fourth one a pause stands for the GPU's work; its first twenty steps are not counted.
    """
    settings, plan = LoaderSettings(cache=CacheBudget(memory=cache), requests=128), window_plan(index, rows, K)
    with TrajectoryLoader(plan, Home(0, 1), stack_windows, [all_fields(index)], settings=settings) as loader:
        steps = max(int(index.steps.sum()) // (K * rows), 60)
        for _ in range(2 * steps):
            next(loader).release()
        began = time.monotonic()
        for _ in range(steps):
            next(loader).release()
        step = 1.2 * (time.monotonic() - began) / steps
        waits = []
        for _ in range(20 + steps):
            batch = next(loader)
            waits.append(batch.counters["wait"])
            time.sleep(step)
            batch.release()
    waited = sum(waits := waits[20:])
    return {"step_seconds": step, "wait_share": waited / (steps * step + waited), "longest_wait": max(waits)}


def _short(found: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))


@contextlib.contextmanager
def environment(endpoint: str, cache: Path) -> Iterator[None]:
    """Environment variables for the store and for the folder of decoded indexes."""
    new = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "TIPHYS_CACHE": str(cache),
    }
    old = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def measure_kind(kind: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one kind of windows, in one dataset behind one store."""
    fields, size, rows = KINDS[kind]
    root = scratch / "root"
    local = write(str(root / "bucket" / kind), fields, int(size * arguments.scale))
    with StoreServer(root, scratch / "nginx") as server, environment(server.endpoint, scratch / "c"):
        index = EpisodeIndex.open(f"s3://bucket/{kind}")
        cache = index_bytes(index) // 4
        if arguments.soak:
            found = soak(index, rows, K, cache, arguments.soak, arguments.pace)
            print(summary(found))
            return found
        found = compare(kind, index, arguments.repeat)
        found["randomness"] = randomness(local, rows)
        found["waiting"] = waiting(index, rows, cache)
        print(kind, found["randomness"], found["waiting"], flush=True)
        if "others" in arguments.only:
            others = compare_others(local, server, rows, cache, arguments.repeat)
            for figures in others.values():
                if "windows_per_second" in figures:
                    figures["share_of_memory"] = figures["windows_per_second"] / found["memory"]["windows_per_second"]
            found["others"] = others
    return found


def measure_processes(scratch: Path, scale: float) -> dict[str, Any]:
    """What four real and eight simulated processes save by their homes."""
    root = scratch / "root"
    write(str(root / "bucket" / "homes"), NARROW, int((500 << 20) * scale))
    with StoreServer(root, scratch / "nginx") as server, environment(server.endpoint, scratch / "c"):
        found = {"homes": four_homes(EpisodeIndex.open("s3://bucket/homes"), server), "nodes": eight_nodes()}
    print("four processes", _short(found["homes"]), found["homes"]["passes"], flush=True)
    print("eight nodes", _short(found["nodes"]), flush=True)
    return found


def measure_plan(scratch: Path, scale: float) -> dict[str, Any]:
    """Run `benchmarks/plan.py` in a process of its own, and print those of its figures that have marks."""
    file = scratch / "plan.json"
    command = [sys.executable, "-m", "benchmarks.plan", "--episodes", f"{1e8 * scale:.0f}", "--json", str(file)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text())
    planned = found["planning"][-1]
    print(f"plan over {planned['episodes']:.3g} episodes: {planned['slots_per_second']:.3g} slots/s", flush=True)
    for case in found["caching"]:
        print(
            f"cache, units of {case['unit_rows']} rows{', pinned' if case['pin'] else ''}: {case['us_a_window']:.1f} µs a "
            f"window, fetched {case['fetched_over_delivered']:.3f} (best with single steps: {case['bound_of_single_steps']:.3f})",
            flush=True,
        )
    return found


def measure_augment(scratch: Path, scale: float) -> dict[str, float]:
    """CPU seconds of 1,000 windows: of the loader, from local shards, and of changing their pictures in every way.

    `rate` is the rate of the changes over that of the loader, for the same CPU time.
    """
    index = write(str(scratch / "images"), IMAGE, int((60 << 20) * scale))
    plan = window_plan(index, KINDS["image"][2], K)
    loader = measure(from_loader(index, plan, index_bytes(index), 0), 300, 300, 3)["cpu_per_1000"]
    out = {"loader": loader}
    how = {"crop": 0.95, "rotate": 5, "brightness": 0.3, "contrast": 0.4, "saturation": 0.5}
    rng = np.random.default_rng(0)
    for name, shape in (("84 x 84 grey", (K, 84, 84, 1)), ("84 x 84 colours", (K, 84, 84, 3))):
        pictures, taken = rng.integers(0, 256, shape, np.uint8), []
        for number in range(30):
            chance = draws(0, number, np.array([0]), np.array([0]), 0)[0]
            began = time.process_time()
            augmented(pictures, how, chance)
            taken.append(time.process_time() - began)
        out[name] = statistics.median(taken) * 1000
        out[f"{name}, rate"] = loader * shape[-1] / out[name]
    print("augment", _short(out), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", default="", metavar="FILE", help="write all figures to this file")
    parser.add_argument("--repeat", type=int, default=5, help="spans of a run over which medians are taken")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the datasets, over the usual one")
    parser.add_argument("--only", default=PARTS, help=f"some of {PARTS}, separated by commas")
    parser.add_argument(
        "--soak", type=float, default=0.0, metavar="MINUTES", help="watch the memory of a vector loader"
    )
    parser.add_argument(
        "--pace", type=float, default=0.0, help="steps a second that a soak consumes; 0: as many as it can"
    )
    arguments = parser.parse_args()
    arguments.only = ["vector"] if arguments.soak else arguments.only.split(",")
    if unknown := set(arguments.only) - set(PARTS.split(",")):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {PARTS}")
    if "others" in arguments.only and not set(KINDS) & set(arguments.only):
        parser.error("--only: `others` is measured beside `vector` or `image`: name one of these too")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in arguments.only:
            folder = Path(scratch) / part
            folder.mkdir()
            if part in KINDS:
                results["soak" if arguments.soak else part] = measure_kind(part, folder, arguments)
            elif part == "processes":
                results[part] = measure_processes(folder, arguments.scale)
            elif part == "augment":
                results[part] = measure_augment(folder, arguments.scale)
            elif part == "plan":
                results[part] = measure_plan(folder, arguments.scale)
            shutil.rmtree(folder)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
