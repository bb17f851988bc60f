"""LeRobot's map reader. It runs in an environment of its own, which has `lerobot`, and imports nothing of Tiphys.

python lerobot_map.py write FOLDER EPISODES STEPS     # a dataset with one camera of 224 × 224
python lerobot_map.py read FOLDER K WINDOWS SEED BACKEND      # random windows of K steps; prints JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FPS, CAMERA, SIDE = 10, "observation.images.top", 224


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


def read(folder: Path, window: int, windows: int, seed: int, backend: str) -> dict[str, float]:
    """Windows per CPU second, of all threads."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    times = {name: [k / FPS for k in range(window)] for name in (CAMERA, "action")}
    dataset = LeRobotDataset("tiphys/benchmark", root=folder, delta_timestamps=times, video_backend=backend)
    chosen = np.random.default_rng(seed).integers(0, len(dataset) - window, windows + 8).tolist()
    for i in chosen[:8]:  # opens the files
        dataset[i]
    began, wall = time.process_time(), time.monotonic()
    for i in chosen[8:]:
        dataset[i]
    return {"cpu": windows / (time.process_time() - began), "wall": windows / (time.monotonic() - wall)}


if __name__ == "__main__":
    operation, target, *numbers = sys.argv[1:]
    if operation == "write":
        write(Path(target), *map(int, numbers))
    else:
        length, count, start, decoder = numbers
        print(json.dumps(read(Path(target), int(length), int(count), int(start), decoder)))
