"""Training windows from a LeRobot dataset as it is, beside other readers of it; what its index and copies of its videos cost.

    python -m benchmarks.inplace [PART …] [--episodes 20] [--steps 100] [--windows 200] [--rounds 3] [--backend pyav]
        [--json FILE]

Parts (all, if none is named): `windows`, `cache` (a quarter of the video), `copies`, `index` (of many MP4s), `memory` (by number
of files).

TIPHYS_LEROBOT_PYTHON names a Python with `lerobot`, which writes the dataset (one camera, 224 × 224, its default codec) and reads
it by its map reader and, if torchcodec can be loaded, by its streaming reader. The readers alternate. Figures are medians of
windows per CPU second: of the whole loader process, its CRCs and its batches included, and of all threads of the other readers.
Times of the wall mean nothing on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiphys.dataio.convert import convert
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.build import index_lerobot
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.launch.loader_bench import all_fields, stack_windows, window_plan

PYTHON = os.environ.get("TIPHYS_LEROBOT_PYTHON", "")
PARTS = ("windows", "cache", "copies", "index", "memory")
FILES = {"index": (1000,), "memory": (10, 1000, 10_000)}
WORKER = Path(__file__).parent / "others" / "lerobot_map.py"
ROWS = 16
WINDOWS = (1, 8)  # steps of a window


def lerobot(*arguments: object) -> str:
    """What LeRobot's worker prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [PYTHON, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def tiphys(index: EpisodeIndex, window: int, windows: int, cache: int) -> dict[str, float]:
    """Windows per CPU second of a loader, and bytes fetched for each byte that windows need, after the cache is full."""
    settings = LoaderSettings(cache=CacheBudget(memory=cache))
    steps = max(windows // ROWS, 1)
    warm = 4 if cache >= video_bytes(index) else steps  # a small cache is filled by as many windows as are counted
    plan, totals = window_plan(index, ROWS, window), dict[str, float]()
    with TrajectoryLoader(plan, Home(0, 1), stack_windows, [all_fields(index)], settings=settings) as loader:
        for number, batch in enumerate(loader):
            if number == warm:
                totals.clear()
            for name, value in batch.counters.items():
                totals[name] = totals.get(name, 0.0) + value
            batch.release()
            if number == steps + warm:
                break
    return {
        "cpu": totals["windows"] / totals["cpu_seconds"],
        "fetched": totals["bytes_store"] / totals["bytes_delivered"],
        "resident": totals["resident_bytes"] / (steps + 1),
    }


def video_bytes(index: EpisodeIndex) -> int:
    return sum(shard.size for shard in index.shards if shard.name.endswith(".mp4"))


def against(index: EpisodeIndex, source: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Windows per CPU second of each reader, which take turns; a reader that cannot run is named with its error."""
    others = {"lerobot": "read", "streaming": "stream"}
    out, cache = dict[str, Any](), max(video_bytes(index), 8 << 20)
    for window in WINDOWS:
        found: dict[str, list[float]] = {"tiphys": [], **{name: [] for name in others}}
        failed: dict[str, str] = {}
        for number in range(given.rounds):
            found["tiphys"].append(tiphys(index, window, given.windows, cache)["cpu"])
            for name, operation in others.items():
                if name in failed:
                    continue
                try:
                    printed = lerobot(operation, source, given.backend, window, given.windows, number)
                    found[name].append(json.loads(printed.splitlines()[-1])["cpu"])
                except RuntimeError as error:
                    failed[name] = str(error).strip().splitlines()[-1]
        middle = {name: statistics.median(values) for name, values in found.items() if values}
        times = {f"times {name}": middle["tiphys"] / value for name, value in middle.items() if name != "tiphys"}
        out[f"K = {window}"] = {**middle, **times, **{f"{name} failed": text for name, text in failed.items()}}
    return out


def many(source: Path, scratch: Path, files: int) -> dict[str, float]:
    """CPU seconds and memory of an index of so many MP4s (links to one of them, each with an episode of version 2.1)."""
    raw = scratch / f"many-{files}"
    write_many(source, raw, files)
    code = "import sys; from benchmarks.inplace import index_one; index_one(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(raw), str(scratch / f"index-{files}")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def index_one(source: str, destination: str) -> None:
    """Index a dataset, read windows of it, and print the CPU seconds and the most memory of this process and its loader."""
    before = _cpu()
    index = index_lerobot(source, destination)
    spent = _cpu() - before
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = tiphys(index, 8, 4 * ROWS, 32 << 20)["resident"]
    print(json.dumps({"CPU seconds": spent, "index, MiB": most / 1024, "loader, MiB": loaded / 2**20}))


def write_many(source: Path, folder: Path, files: int) -> None:
    """A dataset of version 2.1 with one episode in each file, all of them the first episode of `source` (version 3.0)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    info = json.loads((source / "meta/info.json").read_text())
    (camera,) = (k for k, f in info["features"].items() if f["dtype"] == "video")
    place = "chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info |= {"codebase_version": "v2.1", "chunks_size": 1000, "video_path": f"videos/{place}"}
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    rows = pq.read_table(next((source / "data").rglob("*.parquet")))
    rows = rows.filter(pa.compute.equal(rows["episode_index"], 0))
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "push"}))
    first, lines = next((source / f"videos/{camera}").rglob("*.mp4")), []
    for number in range(files):
        names = {"episode_chunk": number // 1000, "episode_index": number, "video_key": camera}
        video, data = folder / info["video_path"].format(**names), folder / info["data_path"].format(**names)
        for path in (video, data):
            path.parent.mkdir(parents=True, exist_ok=True)
        column = rows.schema.names.index("episode_index")
        pq.write_table(rows.set_column(column, "episode_index", pa.array([number] * len(rows))), data)
        os.link(first, video)
        lines.append(json.dumps({"episode_index": number, "tasks": ["push"], "length": len(rows)}))
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines))


def copies(source: Path, scratch: Path) -> dict[str, float]:
    """CPU seconds of a conversion without loss over those of `keep`, and bytes of `keep` over those of the videos."""
    spent, field = {}, {"observation.images.*": {"encoding": "keep"}}
    for name, fields in (("keep", field), ("webp", {})):
        before = _cpu()
        convert(str(source), str(scratch / name), mapping={"fields": fields}, processes=1)
        spent[name] = _cpu() - before
    videos = sum(p.stat().st_size for p in source.rglob("*.mp4"))
    shards = {name: sum(p.stat().st_size for p in (scratch / name).rglob("*.tar")) for name in spent}
    return {
        "times_faster": spent["webp"] / spent["keep"],
        "size_over_video": shards["keep"] / videos,
        "lossless_over_video": shards["webp"] / videos,
    }


def _cpu() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("episodes", 20), ("steps", 100), ("windows", 200), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--backend", default="torchcodec", help="LeRobot's decoder: torchcodec or pyav")
    parser.add_argument("--json")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    given = parser.parse_args()
    if not PYTHON:
        parser.error("TIPHYS_LEROBOT_PYTHON must name a Python with lerobot")
    parts = given.parts or PARTS
    with tempfile.TemporaryDirectory() as folder:
        scratch, out = Path(folder), dict[str, Any]()
        source = scratch / "source"
        lerobot("write", source, given.episodes, given.steps)
        index = index_lerobot(str(source), str(scratch / "index"))
        if "copies" in parts:
            out["copies"] = copies(source, scratch)
        if "windows" in parts:
            out |= against(index, source, given)
        if "cache" in parts:
            quarter = tiphys(index, 8, given.windows, video_bytes(index) // 4)
            out["cache of a quarter, K = 8, bytes fetched ÷ delivered"] = quarter["fetched"]
        asked = {part: counts for part, counts in FILES.items() if part in parts}
        found = {files: many(source, scratch, files) for files in sorted({n for ns in asked.values() for n in ns})}
        out |= {part: {files: found[files] for files in counts} for part, counts in asked.items()}
    for name, value in out.items():
        print(name, value)
    if given.json:
        Path(given.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
