"""Small tasks, an index without data, and random windows, for tests of tokens and objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np

from tiphys.dataio.episode import FieldSpec, TaskSpec, Window
from tiphys.dataio.statistics import Sketch
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.hiding import HIDING
from tiphys.pretrain.tokens.paradigm import (
    ACTION,
    END,
    OBSERVATION,
    RETURN,
    REWARD,
    SUMMARY,
    TEXT,
    Paradigm,
    Part,
    Prompt,
)
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import Objective

TEXTS = ["go to the red ball", "go to a grey box", "öffne die Tür", "pick up the key"]

GRID = TaskSpec(
    "grid",
    (
        FieldSpec("observation.image", "observation", "discrete", "uint8", (7, 7, 3), values=11),
        FieldSpec("observation.direction", "observation", "discrete", "int64", values=4),
        FieldSpec("observation.mission", "text", "text", "str", per="episode"),
        FieldSpec("action", "action", "discrete", "int64", values=7),
    ),
)
ARM = TaskSpec(
    "arm",
    (
        FieldSpec("observation", "observation", "continuous", "float32", (5,)),
        FieldSpec("action", "action", "continuous", "float32", (2,), low=(-2.0, 0.0), high=(2.0, 10.0)),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)
CAMERA = TaskSpec(
    "camera",
    (
        FieldSpec("observation.front", "observation", "image", "uint8", (20, 32, 3)),
        FieldSpec("observation.joints", "observation", "continuous", "float32", (2,)),
        FieldSpec("observation.gripper", "observation", "discrete", "int64", (2,), values=3),
        FieldSpec("observation.goal", "observation", "continuous", "float32", (2,), per="episode"),
        FieldSpec("observation.said", "text", "text", "str"),
        FieldSpec("action.arm", "action", "continuous", "float32", (2,), low=(-1.0,), high=(1.0,)),
        FieldSpec("action.hand", "action", "discrete", "int64", values=2),
    ),
)
TEAM = TaskSpec(  # two agents; the third field is the team's
    "team",
    (
        FieldSpec("observation.own", "observation", "continuous", "float32", (2, 3)),
        FieldSpec("observation.seen", "observation", "discrete", "int64", (2,), values=4),
        FieldSpec("observation.state", "observation", "continuous", "float32", (4,)),
        FieldSpec("mask", "mask", "discrete", "bool", (2, 5), values=2),
        FieldSpec("action", "action", "discrete", "int64", (2,), values=5),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)
CAPTION = TaskSpec(
    "caption",
    (
        FieldSpec("image", "observation", "image", "uint8", (16, 16, 3)),
        FieldSpec("caption", "text", "text", "str", per="episode"),
    ),
)


def row(name: str, *timestep: Part, **options: Any) -> Paradigm:
    return Paradigm(name, "a test", timestep, **options)


_MASKED = (
    Part(RETURN, "integer", weight=1.0),
    Part(OBSERVATION, "uniform", weight=1.0),
    Part(ACTION, "uniform", weight=2.0),
)
_DEMONSTRATED = (Part(RETURN), Part(OBSERVATION), Part(ACTION, weight=1.0))
# Rows of the table for tests, each with something that the rows of the product lack
ROWS = {
    # Every part is predicted, the return without being shown, as in Janner et al. 2021
    "everything": row(
        "everything",
        Part(OBSERVATION, "uniform", weight=1.0),
        Part(ACTION, "uniform", weight=5.0),
        Part(REWARD, "uniform", weight=1.0),
        Part(RETURN, "uniform", weight=0.5, shown=False, source="discounted:.9"),
        tail=(Part(END, weight=3.0), Part(SUMMARY)),
    ),
    "hidden": row("hidden", Part(RETURN, "linear", shown=False), Part(OBSERVATION), Part(ACTION, weight=1.0)),
    "signs": row(
        "signs",
        Part(RETURN, "histogram", source="histogram:reward"),
        Part(OBSERVATION),
        Part(ACTION, "linear", weight=1.0),
        Part(REWARD, "sign", weight=2.0),
        Part(RETURN, "integer", weight=1.0, source="after"),
        future=2,
    ),
    "prefix": row("prefix", *_DEMONSTRATED, mask="prefix", prompt=Prompt(1.0)),
    "turned": row(
        "turned",
        *_DEMONSTRATED,
        mask="prefix",
        prompt=Prompt(1.0, 2, every_window=True, reverse=True, parts=(RETURN, OBSERVATION)),
    ),
    "mixture": row(
        "mixture",
        Part(TEXT),
        Part(RETURN, "linear", weight=1.0),
        Part(OBSERVATION, "vector", weight=1.0),
        Part(ACTION, "linear", weight=1.0),
        Part(REWARD, "sign", weight=3.0),
        mask="both",
        hiding=(("random", 2.0), *((name, 0.5) for name in HIDING if name != "random")),
        future=1,
        loss="factors",
    ),
    "labels": row("labels", Part(OBSERVATION), Part(ACTION, weight=1.0, shown=False), mask="both", future=1),
    "causal hiding": row("causal hiding", *_MASKED, hiding=(("random", 1.0),)),
    **{name: row(name, *_MASKED, mask="both", hiding=((name, 1.0),)) for name in HIDING},
}


class FakeIndex:
    """The parts of an EpisodeIndex that objectives and a plan use: tasks, lengths, texts, statistics."""

    def __init__(self, tasks: Sequence[TaskSpec], episodes: int = 40, seed: int = 0, url: str = "fake"):
        rng = np.random.default_rng(seed)
        self.url = self.fingerprint = url
        self.document: dict[str, Any] = {}
        self.tasks = tuple(tasks)
        self.task = (np.arange(episodes) % len(tasks)).astype(np.int32)
        acts = np.array([any(f.role == "action" for f in t.fields) for t in tasks])
        self.steps = np.where(acts[self.task], rng.integers(3, 30, episodes), 0).astype(np.int32)
        self.total_return = rng.uniform(-3, 5, episodes).astype(np.float32)
        self.episodes = episodes
        self.success = np.full(episodes, -1, np.int8)
        self.hash = rng.integers(0, 1 << 63, episodes).astype(np.uint64)
        self.codes = rng.integers(0, len(TEXTS), episodes).astype(np.int32)
        known = {t.name: [f for f in t.fields if f.modality not in ("text", "image")] for t in tasks}
        self.statistics = self.statistics_with_histograms = {
            name: {f.name: _statistics(f, rng) for f in fields} for name, fields in known.items()
        }

    def text(self, field: str) -> tuple[np.ndarray, list[str]]:
        has = np.array([any(f.name == field for f in t.fields) for t in self.tasks])
        return np.where(has[self.task], self.codes, -1), TEXTS

    def held_out(self, share: float) -> np.ndarray:
        return np.zeros(self.episodes, bool)

    def id(self, episode: int) -> str:
        return f"episode-{episode}"


def _statistics(field: FieldSpec, rng: np.random.Generator) -> Any:
    sketch = Sketch(field.shape)
    sketch.add(values(field, 200, rng).reshape(200, -1).astype(np.float64))
    return sketch.result()


def objectives_of(recipe: Recipe, indexes: Sequence[FakeIndex]) -> Objectives:
    """Objectives over datasets without data. Statistics that are computed from whole episodes come from random returns."""
    sketch = Sketch(())
    sketch.add(np.random.default_rng(2).normal(2, 2, (500, 1)))
    with mock.patch("tiphys.dataio.return_statistics.return_statistics", return_value=sketch.result()):
        return Objectives(recipe, indexes)


def values(field: FieldSpec, rows: int, rng: np.random.Generator) -> np.ndarray:
    shape = (rows, *field.shape)
    if field.dtype == "str":
        return np.array([TEXTS[i] for i in rng.integers(0, len(TEXTS), rows)], dtype=np.dtypes.StringDType())
    if field.modality == "image":
        return rng.integers(0, 256, shape).astype(field.dtype)
    if field.modality == "discrete":
        low, high = field.low or (0,), field.high or ((field.values or 2) - 1,)
        return rng.integers(low, np.add(high, 1), shape).astype(field.dtype)
    low = np.array(field.low) if field.low else -3.0
    high = np.array(field.high) if field.high else 3.0
    return rng.uniform(low, high, shape).astype(field.dtype)


def window(
    objectives: Objectives,
    name: str,
    rows: int,
    rng: np.random.Generator,
    *,
    start: int = 3,
    prompt: bool = False,
    last_without_action: bool = False,
    after: int = 0,
    ends: bool = False,
) -> Window:
    """A window with random values, of a task in mixture entry 0.

    after  rows behind it, of which the last has no action
    ends   the episode ends with the window's last step
    """
    own, rows = rows, rows + after
    task = next(t for t in objectives.tasks if t.name == name)
    fields: dict[str, Any] = {}
    for f in task.fields:
        found = values(f, rows, rng)
        fields[f.name] = (str(found[0]) if f.dtype == "str" else found[0]) if f.per == "episode" else found
    if task.name == "team":  # an action that was taken was available
        fields["mask"] = np.where(fields["action"][..., None] == np.arange(5), True, fields["mask"].astype(bool))
    valid = np.ones(rows, bool)
    valid[-1] = not last_without_action and not after
    return Window(
        entry=0,
        task=objectives.tasks.index(task),
        episode=f"{name}-{start}",
        start=start,
        steps=own,
        episode_steps=start + own + (not ends),
        fields=fields,
        step=np.arange(start, start + rows),
        returns_to_go=rng.uniform(0, 5, rows).astype(np.float32),
        valid=valid,
        prompt=prompt,
    )


def make(tasks: Sequence[TaskSpec], paradigm: str, text: int = 600, **options: Any) -> Objectives:
    """Objectives over one dataset that has these tasks, with one objective named `it`."""
    if paradigm == "dt":  # some of the tasks have no rewards
        options = {"options": {"without_rewards": True}, **options}
    recipe = Recipe(
        name="test",
        data=Data(mixture=[Entry(dataset="fake", objective="it", loss_weight=options.pop("loss_weight", 1.0))]),
        objectives={"it": Objective(paradigm=paradigm, **options)},
        model=Model(text_vocabulary=text),
        run=Run(dir="unused"),
    )
    return objectives_of(recipe, [FakeIndex(tasks)])


def make_each(tasks: Sequence[TaskSpec], paradigms: Sequence[str], **options: Any) -> Objectives:
    """Objectives over one dataset, with an objective for each of these paradigms, named like it."""
    recipe = Recipe(
        name="test",
        data=Data(mixture=[Entry(dataset="fake", objective=name) for name in paradigms]),
        objectives={name: Objective(**options) for name in paradigms},
        model=Model(text_vocabulary=600),
        run=Run(dir="unused"),
    )
    return objectives_of(recipe, [FakeIndex(tasks)] * len(paradigms))
