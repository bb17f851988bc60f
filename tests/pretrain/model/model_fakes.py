"""Small random batches with every kind of element, and a config of a model that accepts them."""

from typing import Any

import numpy as np

from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.tokens.batch import ACTION, CONTINUOUS, IMAGE, TEXT, Embedded, Regression, TokenBatch

EMBEDDERS = {
    "patch:3": {"kind": "patch", "shape": [16, 16, 3], "values": 0},
    "vector:observation:5": {"kind": "vector", "shape": [5], "values": 0},
    "grid:observation.image:7x7x3": {"kind": "grid", "shape": [7, 7, 3], "values": 11, "film": True},
    "tile:observation.image:1x7x3": {"kind": "tile", "shape": [1, 7, 3], "values": 11},
}
RANGES = [["special", 0, 4], ["text", 4, 40], ["continuous", 40, 72], ["discrete", 72, 90]]
TASKS = ["reach", "go", "balance"]


def make_config(**changes: Any) -> DecisionConfig:
    options: dict[str, Any] = {
        "vocab_size": 90,
        "ranges": RANGES,
        "embedders": EMBEDDERS,
        "regressions": {"action:6": 6},
        "tasks": TASKS,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "timesteps": 20,
        "router_task": True,
        "shared_expert": True,
    }
    return DecisionConfig(**(options | changes))


def make_batch(
    rows: int = 4, length: int = 40, seed: int = 0, *, windows: tuple[int, int] = (3, 17), bidirectional: bool = True
) -> TokenBatch:
    """Rows packed with windows of random lengths, with values for every embedder, softmax range and regression head."""
    g = np.random.default_rng(seed)
    shape = (rows, length)
    segment, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    causal, task, step = np.zeros(shape, bool), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in range(rows):
        at, number = 0, 1
        while at <= length - windows[0]:
            size = min(int(g.integers(*windows)), length - at)
            part = slice(at, at + size)
            segment[row, part], position[row, part] = number, np.arange(size)
            causal[row, part] = not bidirectional or g.random() < 0.7
            if bidirectional and g.random() < 0.3:  # a prefix
                causal[row, at : at + size // 2] = False
            task[row, part] = g.integers(len(TASKS))
            step[row, part] = g.integers(18) + np.arange(size) // 5
            at, number = at + size, number + 1
    real = segment > 0
    tokens = np.where(real, g.integers(0, 90, shape), 0).astype(np.int32)
    modality = np.where(real, g.choice([TEXT, CONTINUOUS, ACTION], shape), 0).astype(np.uint8)
    softmax = np.where(real, g.integers(0, 5, shape), 0).astype(np.uint8)
    bounds = np.array([[0, 90], *[r[1:] for r in RANGES]])
    target = g.integers(bounds[softmax][..., 0], bounds[softmax][..., 1]).astype(np.int32)
    target = np.where(real & (g.random(shape) < 0.5), target, -1).astype(np.int32)
    weight = np.where(target >= 0, g.uniform(0.5, 2, shape), 0).astype(np.float32)

    free = g.permutation(np.flatnonzero(real))
    embedded = {}
    for name, count in zip(EMBEDDERS, (3, 5, 4, 6), strict=True):
        index, free = np.sort(free[:count]), free[count:]
        e = EMBEDDERS[name]
        if e["kind"] in ("grid", "tile"):
            value: np.ndarray = g.integers(0, e["values"], (len(index), *e["shape"])).astype(np.uint8)
        else:
            value = g.standard_normal((len(index), *e["shape"])).astype(np.float32)
        is_patch = e["kind"] == "patch"
        placed = e["kind"] in ("patch", "tile")
        place = g.integers(0, 128, (len(index), 2)).astype(np.int32) if placed else np.zeros((0, 2), np.int32)
        embedded[name] = Embedded(index, value, place)
        modality.reshape(-1)[index] = IMAGE if is_patch else CONTINUOUS
    index = np.sort(g.permutation(np.flatnonzero(real))[:6])
    value = g.standard_normal((len(index), 6)).astype(np.float32)
    regression = {"action:6": Regression(index, value, g.uniform(0.5, 2, len(index)).astype(np.float32))}
    return TokenBatch(
        step=7,
        row=np.arange(rows, dtype=np.int64),
        tokens=tokens,
        modality=modality,
        segment=segment,
        position=position,
        local=np.where(real, g.integers(0, 30, shape), 0).astype(np.int32),
        timestep=np.where(real, step, 0).astype(np.int32),
        task=task,
        causal=causal,
        target=target,
        softmax=softmax,
        weight=weight,
        embedded=embedded,
        regression=regression,
    )
