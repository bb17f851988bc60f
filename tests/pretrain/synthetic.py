"""Small random batches, recipes and loaders for tests. A row depends only on (seed, step, row), on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiphys.dataio.philox import WINDOW, generator
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.tokens.batch import ACTION, CONTINUOUS, TEXT, Embedded, Pairs, Regression, TokenBatch
from tiphys.recipes.load import from_dict
from tiphys.recipes.schema import Recipe

LENGTH, VECTOR = 24, 5


def config(**changes: Any) -> DecisionConfig:
    values: dict[str, Any] = {
        "vocab_size": 48,
        "ranges": [("text", 0, 32), ("action", 32, 48)],
        "embedders": {"vector:state:5": {"kind": "vector", "shape": [VECTOR], "values": 0}},
        "regressions": {"action:3": 3},
        "tasks": ["reach", "push", "open"],
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_experts": 4,
        "moe_every": 2,
        "moe_intermediate_size": 32,
        "locals": 16,
    }
    return DecisionConfig(**(values | changes))


def recipe(run_dir: str = "", **sections: Any) -> Recipe:
    """A recipe with AdamW, gradient clipping and 13 rows in each step. `sections` are merged one level deep."""
    values: dict[str, Any] = {
        "name": "test",
        "data": {"mixture": [{"dataset": "file:///nowhere"}]},
        "objectives": {"gato": {"context": LENGTH}},
        "model": {"layers": 4, "hidden": 32, "heads": 2},
        "train": {"steps": 20, "seed": 7},
        "deepspeed": {
            "train_batch_size": 13,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "zero_optimization": {"stage": 1},
        },
        "run": {"dir": run_dir or "unused"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return from_dict(values)


def row(seed: int, step: int, number: int, length: int = LENGTH, pairs: bool = False) -> TokenBatch:
    """One row of the global batch: each window has one task, text, an embedded vector, and actions of two kinds.

    pairs  the first and second window are a pair, the third and fourth, and so on; of three texts
    """
    random = generator(seed, step, number, WINDOW)
    dense: dict[str, Any] = {name: np.zeros((1, length), dtype) for name, dtype in _DTYPES.items()}
    dense["target"] -= 1
    dense["causal"][:] = True
    vectors: list[tuple[int, np.ndarray]] = []
    regressed: list[tuple[int, np.ndarray, float]] = []
    at, segment = 0, 0
    while at < length - 5 and random.random() < 0.95:
        size = int(random.integers(4, min(12, length - at) + 1))
        segment += 1
        here = slice(at, at + size)
        dense["tokens"][0, here] = random.integers(0, 32, size)
        dense["modality"][0, here] = TEXT
        dense["segment"][0, here] = segment
        dense["position"][0, here] = np.arange(size)
        dense["local"][0, here] = np.arange(size) % 4
        dense["timestep"][0, here] = np.arange(size) // 4
        dense["task"][0, here] = random.integers(0, 3)
        dense["causal"][0, here] = random.random() < 0.7
        dense["modality"][0, at] = CONTINUOUS
        vectors.append((at, random.standard_normal(VECTOR)))
        dense["target"][0, at + 1] = random.integers(0, 32)
        dense["target"][0, at + 2] = random.integers(32, 48)
        dense["softmax"][0, at + 2] = 2
        dense["weight"][0, at + 1 : at + 3] = random.uniform(0.5, 2.0, 2)
        dense["modality"][0, at + 3] = ACTION
        if random.random() < 0.5:
            regressed.append((at + 3, random.standard_normal(3), float(random.uniform(0.5, 2.0))))
        at += size
    embedded, regression = {}, {}
    if vectors:
        embedded["vector:state:5"] = Embedded(
            np.array([i for i, _ in vectors], np.int64), np.array([v for _, v in vectors], np.float32)
        )
    if regressed:
        index, value, weight = zip(*regressed, strict=True)
        regression["action:3"] = Regression(
            np.array(index, np.int64), np.array(value, np.float32), np.array(weight, np.float32)
        )
    match = {}
    if pairs and segment > 1:
        last = np.array([np.flatnonzero(dense["segment"][0] == s + 1)[-1] for s in range(segment // 2 * 2)])
        n, ahead = segment // 2, (last[1::2] - last[::2]).astype(np.int32)
        weight = random.uniform(0.5, 2.0, n).astype(np.float32)
        match["match"] = Pairs(last[::2], ahead, random.integers(0, 3, n).astype(np.int32), weight)
    return TokenBatch(step=step, row=np.array([number]), **dense, embedded=embedded, regression=regression, pairs=match)


_DTYPES: dict[str, Any] = {
    **dict.fromkeys(("tokens", "segment", "position", "local", "timestep", "task", "target"), np.int32),
    "modality": np.uint8,
    "softmax": np.uint8,
    "causal": np.bool_,
    "weight": np.float32,
}


def rows_of(step: int, rows: list[int], seed: int = 7, length: int = LENGTH, pairs: bool = False) -> TokenBatch:
    if not rows:
        return TokenBatch.empty(step, length)
    return TokenBatch.concatenate(row(seed, step, r, length, pairs) for r in rows)


def mine(batch: int, replica: int, replicas: int) -> list[int]:
    """The rows of one replica: ⌊B/N⌋ or ⌈B/N⌉ consecutive ones."""
    return list(range(batch * replica // replicas, batch * (replica + 1) // replicas))


@dataclass
class Item:
    step: int
    arrays: dict[str, np.ndarray]
    counters: dict[str, float] = field(default_factory=dict)
    quarantined: list[Any] = field(default_factory=list)
    released: bool = False

    def release(self) -> None:
        self.released = True
        for array in self.arrays.values():  # so that later reads are noticed
            if array.ndim:
                array.view(np.uint8)[...] = 0xFF


class SyntheticLoader:
    """A loader without data: each row depends only on its step and number.

    events   step -> events for the plan's log
    heard    events that the trainer has appended
    given    items that the trainer has received
    """

    def __init__(self, batch: int, replica: int = 0, replicas: int = 1, *, events: dict[int, list[Any]] | None = None):
        self.rows, self.step, self.events = mine(batch, replica, replicas), 0, events or {}
        self.heard: list[Any] = []
        self.given: list[Item] = []

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        batch = rows_of(self.step, self.rows)
        arrays = {name: np.array(a) for name, a in batch.to_arrays().items()}
        item = Item(self.step, arrays, {"cache_hit_rate": 0.75, "store_bytes": 4.0}, self.events.get(self.step, []))
        self.step += 1
        self.given.append(item)
        return item

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "log": self.heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.heard = state["step"], list(state["log"])

    def append(self, events: list[Any]) -> None:
        self.heard += events
