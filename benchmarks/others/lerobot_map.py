"""LeRobot's readers. They run in an environment of their own, which has `lerobot`, and import nothing of Tiphys.

python lerobot_map.py write FOLDER EPISODES STEPS     # a dataset with one camera of 224 × 224
python lerobot_map.py read FOLDER BACKEND K WINDOWS SEED       # random windows of K steps by the map reader; prints JSON
python lerobot_map.py stream FOLDER BACKEND K WINDOWS SEED     # the same by the streaming reader
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FPS, CAMERA, SIDE = 10, "observation.images.top", 224
WARM = 8  # windows before time is taken


def write(folder: Path, episodes: int, steps: int) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: Any = {
        CAMERA: {"dtype": "video", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create("tiphys/benchmark", FPS, features, root=folder, use_videos=True)
    rng = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 9, SIDE))[:, None, None] * 60 + 120
    for number in range(episodes):
        noise = rng.normal(0, 4, (SIDE, SIDE, 3))
        for step in range(steps):
            frame = waves + noise + 20 * np.cos(number + np.arange(3))
            frame[(5 * step) % 180 :][:40, (7 * step + 31 * number) % 180 :][:, :40] = 240
            action = rng.normal(size=7).astype(np.float32)
            dataset.add_frame({CAMERA: np.clip(frame, 0, 255).astype(np.uint8), "action": action, "task": "push"})
        dataset.save_episode()
    dataset.finalize()


def read(folder: Path, backend: str, window: int, windows: int, seed: int) -> dict[str, float]:
    """Windows per CPU second, of all threads."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    times = {name: [k / FPS for k in range(window)] for name in (CAMERA, "action")}
    dataset = LeRobotDataset("tiphys/benchmark", root=folder, delta_timestamps=times, video_backend=backend)
    chosen = np.random.default_rng(seed).integers(0, len(dataset) - window, windows + WARM).tolist()
    return timed((dataset[i] for i in chosen), windows)


def stream(folder: Path, backend: str, window: int, windows: int, seed: int) -> dict[str, float]:
    """The same by the streaming reader, whose windows are only as random as its buffer. It knows one decoder, torchcodec."""
    from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

    times = {name: [k / FPS for k in range(window)] for name in (CAMERA, "action")}
    dataset = StreamingLeRobotDataset(
        "tiphys/benchmark", root=folder, delta_timestamps=times, streaming=True, seed=seed, buffer_size=256
    )
    return timed(iter(dataset), windows)


def timed(windows: Iterator[Any], count: int) -> dict[str, float]:
    for _ in range(WARM):  # opens the files
        next(windows)
    began, wall = time.process_time(), time.monotonic()
    for _ in range(count):
        next(windows)
    return {"cpu": count / (time.process_time() - began), "wall": count / (time.monotonic() - wall)}


if __name__ == "__main__":
    operation, target, *rest = sys.argv[1:]
    if operation == "write":
        write(Path(target), *map(int, rest))
    else:
        reader = {"read": read, "stream": stream}[operation]
        print(json.dumps(reader(Path(target), rest[0], *map(int, rest[1:]))))
