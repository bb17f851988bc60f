"""Rows of a paradigm's own tokens for tests of layouts. A row depends only on (paradigm, step, row), on every rank."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tests.pretrain.token_fixtures import ARM, GRID, ROWS, TEAM, make, window
from tiphys.dataio.philox import WINDOW, generator
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.paradigms import PARADIGMS
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import Flow

TASKS = {
    "reward": (GRID, 96, 4),
    "told": (GRID, 96, 3),  # behaviour cloning; grids are embedded in view of an instruction
    "madt": (TEAM, 64, 2),
}  # task, context, and windows in a row, instead of these of `arm`


CHUNKS: dict[
    str, dict[str, Any]
] = {  # behaviour cloning with these options, some rows of which end before their chunks do
    "flow": {"head": "flow", "horizon": 3, "chunk": 2, "flow": Flow(width=16, depth=1, draws=2)},
    "l1": {"head": "l1", "horizon": 3, "chunk": 2},
    "insulated": {"head": "flow", "horizon": 3, "chunk": 2, "flow": Flow(width=16, depth=1, draws=2), "insulate": 8},
}


@functools.cache
def objectives(name: str) -> Objectives:
    task, context, _ = TASKS.get(name, (ARM, 48, 2))
    if name in CHUNKS:
        return make([ARM], "bc", context=48, **CHUNKS[name])
    if name == "told":
        return make([task], "bc", context=context)
    if name in PARADIGMS:
        return make([task], name, context=context, options={"agents": 2} if task is TEAM else {})
    PARADIGMS[name] = ROWS[name]
    try:
        return make([ARM], name, context=48)
    finally:
        del PARADIGMS[name]


def config(name: str, **changes: Any) -> DecisionConfig:
    sizes = {"num_experts": 4, "moe_every": 2, "moe_intermediate_size": 32, **changes}
    made = DecisionConfig.from_recipe(Model(layers=4, hidden=32, heads=2), objectives(name).vocabulary)
    return DecisionConfig(**{**made.to_dict(), **sizes})


def rows_of(name: str, step: int, rows: list[int]) -> TokenBatch:
    made, windows = objectives(name), []
    for number in rows:
        random = generator(7, step, number, WINDOW)
        row = []
        task, _, several = TASKS.get(name, (ARM, 48, 2))
        for _ in range(several):
            if made.prompts[0] == 1:
                row.append(window(made, "arm", 1, random, prompt=True))
            row.append(window(made, task.name, int(random.integers(1, 3)), random, after=1))
        windows.append(row)
    return TokenBatch.from_arrays(made.make_batch(step, np.array(rows, np.int64), windows, seed=7))
