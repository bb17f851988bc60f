"""Groups of episodes that an evaluation has played, in files, so that one that is killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tiphys.dataio.atomic import atomic_file
from tiphys.dataio.collect import Outcome
from tiphys.pretrain.acting.play import Played


class PlayedGroups:
    """The files of one evaluation.

    Parameters
    ----------
    folder : Path
        Where they are. It is made.
    of : str
        What was evaluated, and how. Files of something else are not read.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self._folder, self._of = folder, of
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, group: Any) -> list[Played] | None:
        """The episodes of a group; None if it has not been played, or its file is damaged.

        group   what is played; its text tells it from others
        """
        try:
            with np.load(self._file(group), allow_pickle=False) as arrays:
                about = json.loads(bytes(arrays["about"]))
                return [
                    Played(seed, Outcome(*outcome), list(arrays[f"actions{i}"]), arrays[f"states{i}"])
                    for i, (seed, outcome) in enumerate(about)
                ]
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            return None

    def keep(self, group: Any, played: Sequence[Played]) -> None:
        """Write the episodes of a group, if their actions are plain numbers. A full disk is no error: they are played again."""
        about = [(p.seed, list(p.outcome)) for p in played]
        arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for i, one in enumerate(played):
            if any(isinstance(action, (dict, tuple)) for action in one.actions):
                return
            if len({(np.asarray(action).dtype, np.shape(action)) for action in one.actions}) != 1:
                return
            arrays |= {f"actions{i}": np.asarray(one.actions), f"states{i}": one.states}
        try:
            with atomic_file(self._file(group)) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError:
            return

    def _file(self, group: Any) -> Path:
        name = hashlib.blake2b(f"{self._of} {group!r}".encode(), digest_size=16).hexdigest()
        return self._folder / f"{name}.npz"
