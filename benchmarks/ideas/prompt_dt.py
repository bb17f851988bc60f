"""Prompt-DT (Xu et al. 2022): five steps of another episode before every window say what the task is.

Six tasks look alike, and each rewards another action. Controls: the demonstration of another task, and none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.ideas.goals import hit, learnt
from benchmarks.ideas.marks import Mark, at_least, at_most


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    policy = learnt({"paradigm": "prompt-dt", "context": 21, "window": 2}, folder, seed)
    score = hit(policy, seed, other=0)
    for broken, other in (("demonstration of another task", 1), ("no demonstration", None)):
        failed = hit(policy, seed, other) if control else None
        yield Mark("share of actions that hit the goal", score, at_least(0.95), failed, at_most(0.25), broken)
