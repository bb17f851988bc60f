"""The measured cost of each layer on this device: seconds of a forward and backward pass. Pipeline stages are chosen by it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiphys.pretrain.model.embedding import Embedding, TokenTable
from tiphys.pretrain.model.heads import SUMS, Head
from tiphys.pretrain.model.inputs import Inputs, scalars, to_tensors
from tiphys.pretrain.model.token_layout import TokenLayout
from tiphys.pretrain.model.transformer import Block, build_layers
from tiphys.pretrain.tokens.batch import TEXT, Chunks, Embedded, Regression, TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

WINDOW = 256  # tokens in a window, at most
TARGETS = 0.3  # share of the positions that are predicted
ROUNDS = 3  # the fastest one counts; one more round goes before to warm up


def layer_seconds(
    config: DecisionConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype, *, expert: int = 1
) -> list[float]:
    """Seconds of every layer, in the order of `build_layers`, for `rows` × `length` positions. Equal layers are timed once.

    The tokens of a run are not known before its data is read, so text and every embedder of the model get equal shares. If
    experts are divided among `expert` ranks, a layer is timed with one rank's experts, without the exchange of tokens.
    """
    own = copy.deepcopy(config)
    own.num_experts = max(config.num_experts // expert, config.num_experts_per_tok) if config.num_experts else 0
    inputs = to_tensors(typical_batch(config, rows, length), device)
    layout = TokenLayout(inputs["windows"], inputs["attributes"], scalars(1.0, 1.0, 1.0, device))
    known: dict[Any, float] = {}
    seconds = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        x = torch.randn(len(inputs["tokens"]), config.hidden_size, device=device).to(dtype).requires_grad_()
        for _, kind, arguments in build_layers(own):
            key = (kind, kind is Block and config.has_experts(arguments[1]))
            if key not in known:
                with torch.device(device):
                    layer = kind(*arguments).to(dtype).train()
                for parameter in layer.parameters():
                    torch.nn.init.normal_(parameter, std=0.02)
                known[key] = _fastest(_pass(layer, x, inputs, layout, own), device)
            seconds.append(known[key])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return seconds


def typical_batch(config: DecisionConfig, rows: int, length: int) -> TokenBatch:
    """Full rows of causal windows, with every kind of token that the model accepts and every kind of target that it predicts."""
    shape, cells = (rows, length), np.arange(rows * length)
    place = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    random = np.random.default_rng(0)
    kinds = len(config.embedders) + 1
    embedded = {}
    for number, (name, spec) in enumerate(sorted(config.embedders.items()), 1):
        index = cells[number::kinds]
        value = np.zeros((len(index), *spec["shape"]), np.int32 if spec["kind"] in ("grid", "tile") else np.float32)
        embedded[name] = Embedded(index, value, np.zeros((len(index), 2), np.int32))
    target = np.where(random.random(shape) < TARGETS, random.integers(0, config.vocab_size, shape), -1)
    some = cells[:: max(1, round(1 / TARGETS))]
    regression = {
        name: Regression(some, np.zeros((len(some), size), np.float32), np.ones(len(some), np.float32))
        for name, size in config.regressions.items()
    }
    chunks = {name: _chunks(some, head) for name, head in config.chunks.items()}
    return TokenBatch(
        step=0,
        row=np.arange(rows),
        tokens=random.integers(0, config.vocab_size, shape).astype(np.int32),
        modality=np.full(shape, TEXT, np.uint8),
        segment=place // WINDOW + 1,
        position=place % WINDOW,
        local=place % config.locals,
        timestep=np.zeros(shape, np.int32),
        task=np.zeros(shape, np.int32),
        causal=np.ones(shape, bool),
        target=target.astype(np.int32),
        softmax=np.zeros(shape, np.uint8),
        weight=(target >= 0).astype(np.float32),
        embedded=embedded,
        regression=regression,
        chunks=chunks,
    )


def _chunks(index: np.ndarray, head: Mapping[str, Any]) -> Chunks:
    n, size, draws = len(index), head["steps"] * head["entries"], head.get("draws", 0)
    zeros = [np.zeros(shape, np.float32) for shape in ((n, size), (n, draws, size), (n, draws))]
    return Chunks(index, zeros[0], np.full(n, head["steps"], np.int32), np.ones(n, np.float32), zeros[1], zeros[2])


def _pass(layer: Any, x: Tensor, inputs: Inputs, layout: TokenLayout, config: DecisionConfig) -> Callable[[], None]:
    """A forward and a backward pass of one layer."""

    def forward() -> Tensor:
        if isinstance(layer, TokenTable):
            return layer(inputs["tokens"])
        if isinstance(layer, Embedding):
            return layer(x, inputs)
        if isinstance(layer, Block):
            return checkpoint(layer, x, layout, use_reentrant=False) if config.checkpointing else layer(x, layout)
        if isinstance(layer, Head):
            return layer(x, inputs, layout)[0]
        sums = torch.zeros(max(1, len(config.tasks)), SUMS, device=x.device)
        return layer(x, torch.zeros(1, device=x.device), sums, inputs, layout)[0]

    def work() -> None:
        out = forward()
        out.backward(torch.ones_like(out))

    return work


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(ROUNDS))
