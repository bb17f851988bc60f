"""Episodes equal what LeRobot's own map reader gives.

TIPHYS_LEROBOT_PYTHON names a Python with `lerobot` and torchvision; without it, nothing is tested.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.dataio.inplace import lerobot_reader
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.inplace.build import index_lerobot

PYTHON = os.environ.get("TIPHYS_LEROBOT_PYTHON", "")


@pytest.mark.long
@pytest.mark.skipif(not PYTHON, reason="TIPHYS_LEROBOT_PYTHON names no Python with lerobot")
def test_rows_and_pictures_equal_those_of_the_map_reader(tmp_path: Path) -> None:
    folder, out = tmp_path / "robot", tmp_path / "read.npz"
    command = [PYTHON, lerobot_reader.__file__, str(folder), str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    read = np.load(out)
    index = index_lerobot(str(folder), str(tmp_path / "indexed"))
    assert index.steps.tolist() == list(lerobot_reader.LENGTHS)
    for camera in lerobot_reader.CAMERAS:
        table = index.packets(camera)
        assert table is not None
        files = np.unique(table.shard)
        assert 3 <= len(files) < index.episodes
    for e in range(index.episodes):
        mine, fields = read["episode_index"] == e, read_episode(index, e).fields
        assert np.array_equal(fields["action"], read["action"][mine])
        assert {fields["instruction"]} == set(read["task"][mine].tolist())
        for camera in lerobot_reader.CAMERAS:
            assert np.array_equal(fields[camera], read[camera][mine])
