"""A run resumes from the newest checkpoint whose bytes are those that were written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.test_checkpoint import part
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain import checkpoint_snapshot
from tiphys.pretrain.checkpoint import Checkpoint, CheckpointError
from tiphys.pretrain.checkpoint_choice import newest_sound


class OneRank:
    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]  # as over the network

    def barrier(self) -> None: ...


def flip(folder: Path) -> Path:
    """Change one bit of the tensors; sizes stay."""
    tensors = folder / "rank00000.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    return tensors


def test_a_checkpoint_with_changed_bytes_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        checkpoint_snapshot.write(part(step), tmp_path)
    changed = flip(files.folder_of(tmp_path, 3))
    found = newest_sound(tmp_path, OneRank())
    assert found is not None
    assert (found.step, found.verified) == (2, True)
    assert re.search(r"set aside.*step-00000003/rank00000.safetensors: differs", caplog.text)
    assert changed.exists(), "nothing but the manifest's name changes"
    assert [c.step for c in Checkpoint.all(tmp_path)] == [2, 1]
    checkpoint_snapshot.write(part(3, save="again"), tmp_path)
    again = newest_sound(tmp_path, OneRank())
    assert again is not None
    assert again.step == 3, "the step is saved anew over the damaged one"


def test_no_sound_checkpoint_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    assert newest_sound(tmp_path, OneRank()) is None
    for step in (1, 2):
        checkpoint_snapshot.write(part(step), tmp_path)
        flip(files.folder_of(tmp_path, step))
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is sound:\n.*00000002.*\n.*00000001"):
        newest_sound(tmp_path, OneRank())
    assert [c.step for c in Checkpoint.all(tmp_path)] == [2, 1]
