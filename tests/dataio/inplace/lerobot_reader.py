"""Run by a Python with `lerobot`: writes a dataset of two cameras with several videos each, and reads datasets by the map reader.

python lerobot_reader.py write FOLDER
python lerobot_reader.py read FOLDER OUT.npz
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

FPS, LENGTHS = 10, (23, 31, 17, 28, 25)
CAMERAS = ("observation.images.top", "observation.images.wrist")


def write(folder: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {"dtype": "video", "shape": (64, 96, 3), "names": ["height", "width", "channels"]}
    features: Any = {**dict.fromkeys(CAMERAS, picture), "action": {"dtype": "float32", "shape": (2,), "names": None}}
    written = LeRobotDataset.create("tiphys/robot", FPS, features, root=folder, use_videos=True)
    written.meta.update_chunk_settings(video_files_size_in_mb=0.08)  # so that videos roll over
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        noise = rng.integers(0, 60, (64, 96, 3))
        for step in range(length):
            pictures = {}
            for k, camera in enumerate(CAMERAS):
                frame = (noise + 40 * k).astype(np.uint8)
                frame[(3 * step) % 48 :][:16, (5 * step + 11 * number) % 80 :][:, :16] = 250 - 8 * number
                pictures[camera] = frame
            written.add_frame(
                {**pictures, "action": rng.normal(size=2).astype(np.float32), "task": f"task {number % 2}"}
            )
        written.save_episode()
    written.finalize()


def read(folder: Path, out: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("tiphys/robot", root=folder, video_backend="pyav")
    found: dict[str, list[Any]] = {name: [] for name in (*CAMERAS, "action", "episode_index", "task")}
    for item in (dataset[i] for i in range(len(dataset))):
        for camera in CAMERAS:
            found[camera].append(np.rint(item[camera].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
        found["action"].append(item["action"].numpy())
        found["episode_index"].append(int(item["episode_index"]))
        found["task"].append(str(item["task"]))
    np.savez(out, **{name: np.stack(values) for name, values in found.items()})


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        read(Path(sys.argv[2]), Path(sys.argv[3]))
