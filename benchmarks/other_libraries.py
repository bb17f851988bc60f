"""Other libraries beside the loader: the same episodes and store, each in its own format and tuned as its documentation says.

The libraries are installed in an environment of their own (`make benchmark-environment`), in which `others/worker.py` runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store import StoreServer
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.index import EpisodeIndex
from tiphys.launch.loader_bench import distinct_bound, window_plan

LIBRARIES = ("lance", "litdata", "streaming", "streaming, random access", "webdataset")
PYTHON = Path(__file__).resolve().parents[1] / ".venv-benchmarks" / "bin" / "python"
WORKER = Path(__file__).resolve().parent / "others" / "worker.py"
HOW = "the other libraries are not installed; `make benchmark-environment` installs them"
_WINDOW = 20
_CACHED = ("streaming", "streaming, random access", "webdataset")  # steady only after a pass over the data
_SECONDS = 10.0  # of the longest span


def compare_others(index: EpisodeIndex, server: StoreServer, rows: int, cache: int, repeat: int) -> dict[str, Any]:
    """Library -> its figures, or the error that it ended with. `index`: the dataset in a local folder; `server` serves what the
    libraries write."""
    if not PYTHON.exists():
        print(HOW, flush=True)
        return {}
    out: dict[str, Any] = {}
    uniform = distinct_bound(index, _WINDOW)
    passes = int(index.steps.sum()) // _WINDOW
    span = max(passes // 2, 16 * rows)
    with tempfile.TemporaryDirectory() as scratch:
        episodes = Path(scratch) / "episodes"
        export(index, episodes, rows, (repeat * span) // rows + 24)
        for name in LIBRARIES:
            folder = server.root / "bucket" / name.replace(", ", "-").replace(" ", "-")
            settings: dict[str, Any] = {
                "folder": str(folder),
                "url": f"s3://bucket/{folder.name}",
                "rows": rows,
                "cache": cache,
                "shard_bytes": min(1 << 20, cache // 8),
                "repeat": repeat,
                "span": span,
                "settle": passes if name in _CACHED else 4 * rows,
                "seconds": _SECONDS,
            }
            try:
                _run(server, "write", name, episodes, settings)
                settings["shards"] = len(list(folder.glob("*.tar")))
                found = _run(server, "read", name, episodes, settings)
                out[name] = {**found, "distinct_over_uniform": found["distinct"] / uniform}
            except subprocess.CalledProcessError as error:
                out[name] = {"error": (error.stderr or "").strip()[-2000:]}
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in out[name].items()}, flush=True)
    return out


def export(index: EpisodeIndex, folder: Path, rows: int, steps: int) -> None:
    """Write all episodes as one array for each field, their lengths, and the windows of the plan's first steps."""
    folder.mkdir(parents=True)
    fields = [field for task in index.tasks for field in task.fields]
    total = int(index.steps.sum())
    arrays = {
        field.name: np.lib.format.open_memmap(folder / f"{field.name}.npy", "w+", field.dtype, (total, *field.shape))
        for field in fields
    }
    at = 0
    for number in range(index.episodes):
        episode = read_episode(index, number)
        for name, array in arrays.items():
            array[at : at + episode.steps] = episode.fields[name]
        at += episode.steps
    np.save(folder / "lengths.npy", np.asarray(index.steps, np.int64))
    plan = window_plan(index, rows, _WINDOW)
    planned = [plan.windows(step) for step in range(steps)]
    windows = [np.stack([p.episode, p.start], axis=1) for p in planned]
    np.save(folder / "windows.npy", np.concatenate(windows))


def _run(server: StoreServer, action: str, name: str, episodes: Path, settings: dict[str, Any]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": server.endpoint,
        "S3_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "LITDATA_DISABLE_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    told = episodes.parent / "settings.json"
    told.write_text(json.dumps(settings))
    done = subprocess.run(
        [str(PYTHON), str(WORKER), action, name, str(episodes), str(told)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(results[-1].removeprefix("RESULT ")) if results else {}
