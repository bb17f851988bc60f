"""`loss_weight: auto` (Reed et al. 2022 mix texts and control): text does not own the gradient.

The agent does what the cue of the step before says. Half of the windows are control, two steps each; half are documents of random
words, which nothing predicts, so their loss stays high, and which have far more tokens. Score: by how many standard errors fewer
actions are correct than with control alone, learned from as many windows of control. Control: the weight 1.

The policy's window is one step after each hop, so the best that it can be is right in every other step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import WIDE, train
from benchmarks.ideas.worlds import Behaviour, Cued, behave, play
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec

BOOK = TaskSpec("book", (FieldSpec("text", "text", "text", "str", per="episode"),))
WORDS, PLAYED, ROWS = 200, 60, 8


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    world = Cued(rewarded=False)
    data = behave(world, 400, seed, obedient(world))
    cued = write(folder / "cued", [world.task], data.episodes(world.task, "cued"))
    books = write(folder / "books", [BOOK], documents(np.random.default_rng([seed, 7])))

    def correct(*mixture: dict[str, object]) -> float:
        objective = {"paradigm": "gato", "context": 64, "prompt": 0.0, "window": 2}
        rows = ROWS * len(mixture)
        policy = train(list(mixture), objective, steps=75, rows=rows, seed=seed, model=WIDE, sample=False)
        return float(play(policy, world, PLAYED, seed).rewards.mean())

    alone = correct({"dataset": cued})

    def below(weight: object) -> float:
        mixed = correct({"dataset": cued}, {"dataset": books, "loss_weight": weight})
        error = np.sqrt((spread(alone) + spread(mixed)) / (PLAYED * world.steps))
        return float((alone - mixed) / error)

    yield Mark(
        "actions below control alone, in standard errors",
        below("auto"),
        at_most(2.0),
        below(1.0) if control else None,
        at_least(2.0),
        "weight 1",
    )


def spread(share: float) -> float:
    """Variance of one action, at least that of one wrong action among all."""
    return max(share * (1 - share), 1 / (PLAYED * 10))


def obedient(world: Cued) -> Callable[[np.random.Generator], Behaviour]:
    """Does what the cue of the step before says."""

    def make(random: np.random.Generator) -> Behaviour:
        return lambda fields, step: world.wanted

    return make


def documents(random: np.random.Generator) -> list[Episode]:
    """Texts of words in random order."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, 4)) for _ in range(WORDS)]
    return [Episode(f"book-{i}", "book", {"text": " ".join(random.choice(words, 60))}, 0) for i in range(200)]
