"""Episodes equal what LeRobot's own map reader gives, of its datasets and of those that are exported for it.

TIPHYS_LEROBOT_PYTHON names a Python with `lerobot` and torchvision; without it, nothing is tested.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.inplace import lerobot_reader
from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.export import export, lerobot_videos
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.build import index_lerobot

PYTHON = os.environ.get("TIPHYS_LEROBOT_PYTHON", "")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON, reason="TIPHYS_LEROBOT_PYTHON names no Python with lerobot"),
]
KEEP = {"fields": {"observation.images.*": {"encoding": "keep"}}}


def lerobot(*arguments: object) -> None:
    command = [PYTHON, lerobot_reader.__file__, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lerobot") / "robot"
    lerobot("write", folder)
    return folder


def read(folder: Path, scratch: Path) -> Mapping[str, Any]:
    lerobot("read", folder, scratch / "read.npz")
    return np.load(scratch / "read.npz")


def assert_same(index: EpisodeIndex, theirs: Mapping[str, Any]) -> None:
    assert index.steps.tolist() == list(lerobot_reader.LENGTHS)
    for e in range(index.episodes):
        mine, fields = theirs["episode_index"] == e, read_episode(index, e).fields
        assert np.array_equal(fields["action"], theirs["action"][mine])
        assert {fields["instruction"]} == set(theirs["task"][mine].tolist())
        for camera in lerobot_reader.CAMERAS:
            assert np.array_equal(fields[camera], theirs[camera][mine])


def test_rows_and_pictures_equal_those_of_the_map_reader(robot: Path, tmp_path: Path) -> None:
    index = index_lerobot(str(robot), str(tmp_path / "indexed"))
    for camera in lerobot_reader.CAMERAS:
        table = index.packets(camera)
        assert table is not None
        assert 3 <= len(np.unique(table.shard)) < index.episodes
    assert_same(index, read(robot, tmp_path))


def test_lerobot_reads_the_pictures_of_an_export_of_kept_videos(
    robot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(str(robot), str(tmp_path / "kept"), mapping=KEEP, processes=1)
    monkeypatch.setattr(lerobot_videos, "FILE_BYTES", 150_000)
    export(str(tmp_path / "kept"), str(tmp_path / "out"), format="lerobot")
    for camera in lerobot_reader.CAMERAS:
        assert 1 < len(list((tmp_path / f"out/videos/{camera}").rglob("*.mp4"))) < len(lerobot_reader.LENGTHS)
    assert_same(EpisodeIndex.open(str(tmp_path / "kept")), read(tmp_path / "out", tmp_path))
