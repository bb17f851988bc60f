"""A window with a value that cannot be learned from is replaced, the same on any number of processes and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.loading_fixtures import CONTROL, PICTURES, digest_batch, episode
from tests.dataio.test_loader import NEEDS, SETTINGS, copied, make_plan, rows_of
from tiphys.dataio.episode import BadValue, DataError, Window
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import LoadedBatch, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.dataio.shards import ShardWriter

STEPS = 6


def make_batch(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    """Like a real one, it refuses NaN. `digest_batch` then shows that the delivered windows have none."""
    for window in (w for row in windows for w in row):
        for name, value in window.fields.items():
            if getattr(value, "dtype", None) == np.float32 and np.isnan(value).any():
                raise BadValue(f"episode {window.episode!r}, field {name!r}: NaN")
    return digest_batch(step, rows, windows)


def dataset(url: str, bad: range) -> EpisodeIndex:
    """60 episodes. One observation in the middle of each episode in `bad` is NaN."""
    rng, tasks = np.random.default_rng(0), (CONTROL, PICTURES)
    with ShardWriter(url, tasks, shard_bytes=200_000) as writer:
        for number in range(60):
            one = episode(number, tasks[number % 2], rng)
            if number in bad:
                one.fields["observation"][one.steps // 2] = np.nan
            writer.write(one)
    return EpisodeIndex.open(url)


def load(index: Any, home: Home, start: int = 0, stop: int = STEPS, **plan: Any) -> list[LoadedBatch]:
    with TrajectoryLoader(
        make_plan(index, **plan), home, make_batch, NEEDS, settings=SETTINGS, start=start, stop=stop
    ) as loader:
        return [copied(batch) for batch in loader]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> EpisodeIndex:
    return dataset(str(tmp_path_factory.mktemp("data") / "set"), range(0, 6, 2))


@pytest.mark.parametrize("replacement", [True, False])
def test_rows_are_the_same_on_any_number_of_processes_and_after_a_resume(index: EpisodeIndex, replacement: bool):
    whole = load(index, Home(0, 1), replacement=replacement)
    parts = [b for p in range(2) for b in load(index, Home(p, 2), replacement=replacement)]
    assert rows_of(whole) == rows_of(parts)
    resumed = load(index, Home(0, 1), start=STEPS // 2, replacement=replacement)
    assert rows_of(resumed) == rows_of([b for b in whole if b.step >= STEPS // 2])
    named = {(e["id"], e["kind"], "NaN" in e["reason"]) for b in whole for e in b.quarantined}
    assert named
    assert named <= {(f"reach-0000{n}", "quarantine", True) for n in (0, 2, 4)}


def test_many_bad_windows_end_the_loading(tmp_path: Path):
    bad = dataset(str(tmp_path / "set"), range(0, 60, 2))
    with pytest.raises(DataError, match=r"windows could not be read, or have values.*'observation': NaN"):
        load(bad, Home(0, 1))
