"""Multimodal interactive agent (Abramson et al. 2021): it also learns whether a text belongs to what was seen.

Four things lie in places, and the text names the one to walk to; what was seen tells where the agent went, so which text fits.
Controls: no text is swapped; the policy is compared with plain behaviour cloning. Both policies draw their actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.ideas.marks import Mark, at_least, at_most
from benchmarks.ideas.toys import write
from benchmarks.ideas.training import WIDE, train
from benchmarks.ideas.worlds import discrete
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.pretrain.acting.policy import Policy

THINGS = ["ball", "box", "key", "door"]
STEPS, PLACES = 4, 4
WORLDS = 400  # in which the policies act
BC_STEPS = 150  # mia gets twice as many, because half of its windows teach no action
TASK = TaskSpec(
    "walk",
    (
        FieldSpec("observation.here", "observation", "discrete", "int64", (), values=len(THINGS)),
        FieldSpec("observation.things", "observation", "discrete", "int64", (PLACES,), values=len(THINGS)),
        FieldSpec("observation.mission", "text", "text", "str", per="episode"),
        discrete("action", "action", PLACES),
    ),
)


def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:
    random = np.random.default_rng([seed, 1])
    dataset = write(folder / "data", [TASK], [episode(random, i) for i in range(600)])
    mia = learnt(dataset, "mia", seed)
    failed = judged(learnt(dataset, "mia", seed, swap=0.0), seed) if control else None
    yield Mark("share of texts judged correctly", judged(mia, seed), at_least(0.9), failed, at_most(0.6), "no swaps")
    above = successes(mia, seed) - successes(learnt(dataset, "bc", seed), seed)  # in the same worlds
    error = max(float(above.std(ddof=1)), 1 / WORLDS) / np.sqrt(WORLDS)
    other = float(successes(mia, seed, lie=True).mean()) if control else None
    yield Mark(
        "success above bc's, in standard errors of the difference",
        float(above.mean()) / error,
        at_least(-1.0),
        other,
        at_most(0.3),
        "another text: success",
    )


def begin(random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Which thing lies in each place, and the thing to walk to."""
    return random.permutation(len(THINGS)), int(random.integers(len(THINGS)))


def episode(random: np.random.Generator, number: int) -> Episode:
    """An expert's: it walks to the place of the thing, and stays there."""
    things, wanted = begin(random)
    goal = int(np.flatnonzero(things == wanted)[0])
    places = np.array([random.integers(PLACES), *[goal] * STEPS])
    fields = {
        "observation.here": things[places],
        "observation.things": np.tile(things, (STEPS + 1, 1)),
        "observation.mission": f"go to the {THINGS[wanted]}",
        "action": np.full(STEPS, goal),
    }
    return Episode(f"walk-{number}", TASK.name, fields, STEPS)


def learnt(dataset: str, paradigm: str, seed: int, **options: float) -> Policy:
    objective = {"paradigm": paradigm, "context": 160, "window": STEPS, "options": options}
    return train(
        [{"dataset": dataset}],
        objective,
        steps=BC_STEPS * (1 + (paradigm == "mia")),
        rows=16,
        seed=seed,
        data={"starts": "windows"},
        model=WIDE,
    )


def judged(policy: Policy, seed: int) -> float:
    """Share of texts, half of them false, that are judged correctly from an expert's episode."""
    random = np.random.default_rng([seed, 2])
    correct = []
    for number in range(60):
        one = episode(random, number)
        clip = [
            {"here": int(one.fields["observation.here"][t]), "things": one.fields["observation.things"][t]}
            for t in range(STEPS)
        ]
        true = str(one.fields["observation.mission"])
        false = [text for thing in THINGS if (text := f"go to the {thing}") != true]
        found = policy.match(TASK.name, [clip], [true, false[int(random.integers(len(false)))]])[0]
        correct += [found[0] > 0.5, found[1] < 0.5]
    return float(np.mean(correct))


def successes(policy: Policy, seed: int, lie: bool = False) -> np.ndarray:
    """float64 [worlds]: 1 if the first action goes to the thing that is wanted; `lie`: the text names another one."""
    random = np.random.default_rng([seed, 3])
    worlds = [begin(random) for _ in range(WORLDS)]
    said = [(wanted + lie) % len(THINGS) for _, wanted in worlds]
    policy.reset(TASK.name, len(worlds), instruction=_texts(said))
    seen = [{"here": int(things[random.integers(PLACES)]), "things": things} for things, _ in worlds]
    actions = policy.act(seen)
    return np.array([things[a] == wanted for a, (things, wanted) in zip(actions, worlds, strict=True)], np.float64)


def _texts(numbers: Sequence[int]) -> list[str]:
    return [f"go to the {THINGS[i]}" for i in numbers]
