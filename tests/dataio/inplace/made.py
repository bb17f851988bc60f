"""LeRobot v3 sources of several files and two cameras, and what a loader makes of a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.dataio.convert.convert_sources import scene, video
from tests.dataio.loading_fixtures import copied, digest_batch
from tiphys.dataio.convert import convert
from tiphys.dataio.episode import Needs
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan

FPS = 10
LENGTHS = (9, 14, 7, 11, 16, 8, 12)
CAMERAS = {
    "observation.images.top": (3, 5, 7),
    "observation.images.wrist": (2, 7),
}  # camera -> last episode of each file, + 1
FIELDS = ("observation.state", "action", "observation.images.top", "observation.images.wrist", "instruction")
NEEDS = (Needs(FIELDS),)
ONE = Home(0, 1)


def source(folder: Path, codec: str = "libx264", gop: int = 5) -> Path:
    """A v3 source. Groups of pictures do not end where episodes do, and h264 has B-frames."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for sub in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / sub).mkdir(parents=True)
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    number = {"dtype": "int64", "shape": [1], "names": None}
    picture = {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channel"]}
    info = {
        "codebase_version": "v3.0", "fps": FPS, "total_episodes": len(LENGTHS), "total_frames": sum(LENGTHS),
        "data_path": f"data/{place}.parquet", "video_path": f"videos/{{video_key}}/{place}.mp4",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [3], "names": None},
            "action": {"dtype": "float32", "shape": [2], "names": None},
            **dict.fromkeys(CAMERAS, picture), "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), number),
        },
    }  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(pa.table({"task_index": [0], "task": ["Pick it up."]}), folder / "meta/tasks.parquet")
    pq.write_table(
        pa.concat_tables([_rows(e, n) for e, n in enumerate(LENGTHS)]), folder / "data/chunk-000/file-000.parquet"
    )
    columns: dict[str, Any] = {
        "episode_index": list(range(len(LENGTHS))), "tasks": [["Pick it up."]] * len(LENGTHS), "length": list(LENGTHS),
        "data/chunk_index": [0] * len(LENGTHS), "data/file_index": [0] * len(LENGTHS),
    }  # fmt: skip
    for key, ends in CAMERAS.items():
        files, starts, first = list[int](), list[float](), 0
        for file, end in enumerate(ends):
            lengths = LENGTHS[first:end]
            frames = np.concatenate([scene(n, 3 * (first + i) + len(key)) for i, n in enumerate(lengths)])
            video(folder / f"videos/{key}/chunk-000/file-{file:03d}.mp4", frames, FPS, codec, gop)
            files += [file] * len(lengths)
            starts += (np.cumsum([0, *lengths])[:-1] / FPS).tolist()
            first = end
        columns |= {f"videos/{key}/chunk_index": [0] * len(LENGTHS), f"videos/{key}/file_index": files}
        columns |= {f"videos/{key}/from_timestamp": starts}
    pq.write_table(pa.table(columns), folder / "meta/episodes/chunk-000/file-000.parquet")
    return folder


def _rows(episode: int, length: int) -> Any:
    import pyarrow as pa

    r = np.random.default_rng(episode)
    vectors = {"observation.state": r.normal(size=(length, 3)), "action": r.normal(size=(length, 2))}
    return pa.table(
        {k: pa.array(v.astype(np.float32).tolist(), pa.list_(pa.float32())) for k, v in vectors.items()}
        | {"timestamp": (np.arange(length) / FPS).astype(np.float32), "frame_index": np.arange(length)}
        | {"episode_index": np.full(length, episode), "index": np.arange(length), "task_index": np.zeros(length, int)}
    )


def converted(source: Path, out: Path) -> EpisodeIndex:
    """The dataset with its pictures stored anew, without loss."""
    convert(str(source), str(out), mapping={"fields": {"observation.images.*": {"encoding": "png"}}}, processes=1)
    return EpisodeIndex.open(str(out))


def make_plan(index: EpisodeIndex, rows: int = 7, needs: Needs = NEEDS[0]) -> SamplingPlan:
    lengths = EntryLengths.plain(index.steps, 4, 3, tasks=1, fixed=np.full(index.episodes, 4))
    entry = PlanEntry(index=index, lengths=lengths, weight=1.0, name="robot", tasks=[0], priority=None)
    return SamplingPlan([entry], rows=rows, budget=32, seed=5)


def batches(index: EpisodeIndex, home: Home = ONE, start: int = 0, stop: int = 3, **more: Any) -> dict[Any, Any]:
    """(step, row) -> digest of the row's windows, and under None the events of quarantine."""
    make_batch = more.pop("make_batch", digest_batch)
    settings = LoaderSettings(cache=more.pop("cache", CacheBudget(memory=4 << 20)), **more)
    out: dict[Any, Any] = {None: []}
    with TrajectoryLoader(
        make_plan(index), home, make_batch, NEEDS, settings=settings, start=start, stop=stop
    ) as loader:
        for batch in map(copied, loader):
            out[None] += batch.quarantined
            for row, digest in zip(batch.arrays["row"].tolist(), batch.arrays["digest"], strict=True):
                assert (batch.step, row) not in out
                out[batch.step, row] = digest.tobytes()
    return out
