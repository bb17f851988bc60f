"""MineCLIP (Fan et al. 2022): which of 16 texts belongs to what was seen.

Each frame shows the symbol that the text names with a probability of 0.3, else any symbol. The best that can be done is to count
(Bayes). Control: texts of other episodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import train
from benchmarks.ideas.worlds import discrete
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.pretrain.acting.policy import Policy

SYMBOLS, FRAMES, SHOWN = 16, 8, 0.3
EPISODES = 1500  # a model of this size learns 600 by heart
TEXTS = [f"find {word}" for word in "ash bay cow dew elk fir gem hen ice jam kit log mud nut oak pig".split()]
TASK = TaskSpec(
    "look",
    (
        discrete("observation", "observation", SYMBOLS),
        discrete("action", "action", 2),
        FieldSpec("mission", "text", "text", "str", per="episode"),
    ),
)


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    random = np.random.default_rng([seed, 1])
    named, frames = seen(random, EPISODES)
    policy = learnt(named, frames, folder / "data", seed)
    asked, clips = seen(random, 400)
    failed = None
    if control:
        failed = top_1(learnt(random.permutation(named), frames, folder / "shuffled", seed), asked, clips)
    share = top_1(policy, asked, clips) / bayes(random, asked, clips)
    yield Mark(
        "top-1 of 16 ÷ that of Bayes", share, at_least(0.85), failed, at_most(0.12), "texts of other episodes: top-1"
    )


def seen(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the texts [n], and frames [n, FRAMES]."""
    named = random.integers(0, SYMBOLS, n)
    noise = random.integers(0, SYMBOLS, (n, FRAMES))
    return named, np.where(random.random((n, FRAMES)) < SHOWN, named[:, None], noise)


def learnt(named: np.ndarray, frames: np.ndarray, folder: Path, seed: int) -> Policy:
    episodes = [
        Episode(
            f"look-{i}",
            TASK.name,
            {"observation": shown, "action": np.zeros(FRAMES, np.int64), "mission": TEXTS[text]},
            FRAMES,
        )
        for i, (text, shown) in enumerate(zip(named.tolist(), frames, strict=True))
    ]
    dataset = write(folder, [TASK], episodes)
    objective = {"paradigm": "reward", "context": 512, "window": FRAMES}
    return train([{"dataset": dataset}], objective, steps=220, rows=4, seed=seed, data={"starts": "windows"})


def top_1(policy: Policy, asked: np.ndarray, clips: np.ndarray) -> float:
    found = policy.match(TASK.name, [[{"observation": frame} for frame in clip] for clip in clips], TEXTS)
    return float((found.argmax(1) == asked).mean())


def bayes(random: np.random.Generator, asked: np.ndarray, clips: np.ndarray) -> float:
    """Top-1 of the text whose symbol is seen most often; a tie is decided at random."""
    counts = (clips[:, :, None] == np.arange(SYMBOLS)).sum(1)
    return float(((counts + random.random(counts.shape)).argmax(1) == asked).mean())
