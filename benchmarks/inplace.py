"""Training windows from a LeRobot dataset as it is, beside LeRobot's map reader; and copies of its videos, beside a conversion.

    python -m benchmarks.inplace [--episodes 20] [--steps 100] [--windows 200] [--rounds 3] [--backend pyav] [--json FILE]

TIPHYS_LEROBOT_PYTHON names a Python with `lerobot`, which writes the dataset (one camera, 224 × 224, its default codec) and reads
it. The readers alternate. Figures are medians of windows per CPU second: of the whole loader process, its CRCs and its batches
included, and of all threads of LeRobot's reader.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tiphys.dataio.convert import convert
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.build import index_lerobot
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.launch.loader_bench import all_fields, stack_windows, window_plan

PYTHON = os.environ.get("TIPHYS_LEROBOT_PYTHON", "")
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
    plan = window_plan(index, ROWS, window)
    done, spent, began = 0, 0.0, time.monotonic()
    with TrajectoryLoader(plan, Home(0, 1), stack_windows, [all_fields(index)], settings=settings) as loader:
        for number, batch in enumerate(loader):
            if number == 4:
                done, spent, began = 0, 0.0, time.monotonic()
            done, spent = done + int(batch.counters["windows"]), spent + batch.counters["cpu_seconds"]
            batch.release()
            if number == steps + 4:
                break
    return {"cpu": done / spent, "wall": done / (time.monotonic() - began)}


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
    given = parser.parse_args()
    if not PYTHON:
        parser.error("TIPHYS_LEROBOT_PYTHON must name a Python with lerobot")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", dict[str, Any]()
        lerobot("write", source, given.episodes, given.steps)
        began = _cpu()
        index = index_lerobot(str(source), str(Path(folder) / "index"))
        out["index, CPU seconds"] = _cpu() - began
        out["copies"] = copies(source, Path(folder))
        cache = max(sum(p.stat().st_size for p in source.rglob("*.mp4")), 8 << 20)
        for window in WINDOWS:
            ours, theirs = [], []
            for number in range(given.rounds):
                ours.append(tiphys(index, window, given.windows, cache)["cpu"])
                printed = lerobot("read", source, window, given.windows, number, given.backend)
                theirs.append(json.loads(printed.splitlines()[-1])["cpu"])
            pair = statistics.median(ours), statistics.median(theirs)
            out[f"K = {window}"] = {"tiphys": pair[0], "lerobot": pair[1], "times": pair[0] / pair[1]}
    for name, value in out.items():
        print(name, value)
    if given.json:
        Path(given.json).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
