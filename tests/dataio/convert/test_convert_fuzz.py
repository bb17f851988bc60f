"""Fuzzing: reading a damaged source gives episodes, malformed episodes or a DataError, and never anything else."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.dataio.convert.convert_sources import MAKERS
from tests.dataio.convert.mutate import damage
from tiphys.dataio.convert.converter import BUILT_IN, BadEpisode
from tiphys.dataio.convert.infer import conform
from tiphys.dataio.convert.process import Reader
from tiphys.dataio.episode import DataError

INPUTS = int(os.environ.get("TIPHYS_FUZZ_INPUTS", "10000"))  # for each maker, in the long tests
MEMORY = 2 << 30


def fuzz(made: Any, name: str, folder: Path, inputs: int, seed: int = 0) -> dict[str, int]:
    """Read `inputs` damaged sources and count the outcomes. Fails on any other exception than DataError."""
    source, format, _ = made(name)
    root = source.parent if source.is_file() else source
    files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    target = folder / root.name
    counts = {"episodes": 0, "bad": 0, "errors": 0, "deaths": 0}
    url = str(target / source.name) if source.is_file() else str(target)
    reader = Reader(url, BUILT_IN[format], memory=MEMORY, timeout=60.0)
    with reader:
        for number in range(inputs):
            rng = random.Random(f"{name} {seed} {number}")
            damaged = damage(target, files, rng)
            try:
                _read(reader, counts)
            except DataError as error:
                counts["errors"] += 1
                counts["deaths"] += "reader process" in str(error)
            except Exception as error:
                raise AssertionError(f"input {number} of {name} (seed {seed}), {damaged} damaged: {error!r}") from error
    return counts


def _read(reader: Reader, counts: dict[str, int]) -> None:
    plan = reader.plan()
    pieces, tasks = plan.pieces, plan.tasks
    known = {t.name: t for t in tasks}
    for piece in pieces:
        for item in reader.episodes(piece):
            if isinstance(item, BadEpisode):
                counts["bad"] += 1
                counts["deaths"] += "reader process" in item.reason
                continue
            assert item.task in known
            try:
                conform(item, known[item.task], item.id)
                counts["episodes"] += 1
            except DataError:
                counts["bad"] += 1


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_damaged_sources_give_only_data_errors(made: Any, name: str, tmp_path: Path) -> None:
    counts = fuzz(made, name, tmp_path, 20)
    assert counts["episodes"] > 0, "no damaged source was readable, so the test proves little"
    assert counts["errors"] + counts["bad"] > 0


@pytest.mark.long
@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_many_damaged_sources_give_only_data_errors(made: Any, name: str, tmp_path: Path) -> None:
    counts = fuzz(made, name, tmp_path, INPUTS, seed=1)
    print(name, counts)
    assert counts["episodes"] > 0
    assert counts["errors"] + counts["bad"] > 0


@pytest.mark.long
@pytest.mark.timeout(36_000)
@pytest.mark.parametrize(("name", "format", "share"), [("bridge_rlds", "rlds", 10), ("g1_lerobot", "lerobot", 100)])
def test_damaged_real_files_give_only_data_errors(
    shared_data: Path, name: str, format: str, share: int, tmp_path: Path
) -> None:
    counts = fuzz(lambda _: (shared_data / name, format, {}), name, tmp_path, INPUTS // share, seed=2)
    assert counts["errors"] + counts["bad"] > 0
