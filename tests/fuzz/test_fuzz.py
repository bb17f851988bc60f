"""Damaged inputs are read or refused with one of our errors, by every reader of foreign bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.readers import Reader, make
from tests.fuzz.run import attempt, fuzz

NAMES = sorted(make(Path("unused")))


@pytest.mark.parametrize("name", NAMES)
def test_some_damaged_inputs(name: str, tmp_path: Path) -> None:
    readers, made = make(tmp_path), dict[str, Reader]()
    outcomes = [attempt(name, number, readers, tmp_path, made) for number in range(10 if name == "lerobot" else 40)]
    assert set(outcomes) <= {"read", "refused"}, next(o for o in outcomes if o not in ("read", "refused"))
    assert "refused" in outcomes


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_inputs(name: str) -> None:
    counts, reports, _ = fuzz(name, 2000, start=1000)
    assert set(counts) <= {"read", "refused"}, reports
