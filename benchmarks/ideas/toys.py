"""Toy episodes as datasets on disk, which are opened like any other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tiphys.dataio.episode import Episode, TaskSpec
from tiphys.dataio.shards import ShardWriter


def write(folder: Path, tasks: Sequence[TaskSpec], episodes: Iterable[Episode]) -> str:
    """Write a dataset. Returns its folder."""
    with ShardWriter(str(folder), tasks) as writer:
        for episode in episodes:
            writer.write(episode)
    return str(folder)
