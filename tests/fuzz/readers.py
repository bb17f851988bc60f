"""All readers of foreign bytes, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import datasets, policies, videos
from tests.fuzz.reader import Reader

__all__ = ["Reader", "make"]


def make(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Every reader by name, made when it is called."""
    return {**datasets.make(folder), **videos.make(folder), **policies.make(folder)}
