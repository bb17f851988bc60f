"""Floating-point operations of a step: active parameters, attention inside windows, logits at targets. Padding is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

CHANNELS = 64  # of the convolutions in embedding.py; defined here because this file imports no torch


def flops_per_batch(config: DecisionConfig, batch: TokenBatch) -> float:
    """Operations of a forward and a backward pass over this batch; a multiplication and an addition are two operations.

    The backward pass counts as two forward passes. Not counted: norms, softmaxes, rotations, table look-ups, recomputation.
    """
    lengths, causal = window_lengths(batch)
    # A causal query sees half of its window on average. Attention has two products.
    pairs = float((lengths * np.where(causal, (lengths + 1) / 2, lengths)).sum())
    forward = lengths.sum() * sum(layer_flops(config, i) for i in range(config.num_hidden_layers))
    forward += config.num_hidden_layers * 4 * pairs * config.num_attention_heads * config.head_size
    bounds = [(0, config.vocab_size), *((r[1], r[2]) for r in config.ranges)]
    counts = np.bincount(batch.softmax[batch.target >= 0], minlength=len(bounds))
    forward += sum(2 * config.hidden_size * (hi - lo) * n for (lo, hi), n in zip(bounds, counts, strict=True))
    for name, r in batch.regression.items():
        forward += 2 * config.hidden_size * config.regressions[name] * len(r.index)
    forward += sum(chunk_flops(config.chunks[n], config.hidden_size) * len(c.index) for n, c in batch.chunks.items())
    forward += sum(4 * config.hidden_size**2 * len(p.index) for p in batch.pairs.values())
    for name, e in batch.embedded.items():
        forward += embedder_flops(config.embedders[name], config.hidden_size) * len(e.index)
    return 3.0 * float(forward)


def window_lengths(batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and causal flags of all windows of a batch. A window with a prefix counts as causal."""
    segment = batch.segment.reshape(-1)
    real = np.flatnonzero(segment > 0)
    key = real // max(1, batch.length) << 32 | segment[real]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    size = np.diff(first, append=len(real))
    return size, batch.causal.reshape(-1)[real[first + size - 1]]


def layer_flops(config: DecisionConfig, layer: int) -> float:
    """Operations of a layer's matrices for one token, forward pass."""
    size = config.hidden_size
    attention = 2 * size * config.head_size * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    if not config.has_experts(layer):
        return attention + 6 * size * config.intermediate_size
    experts = config.num_experts_per_tok + int(config.shared_expert)
    return attention + 6 * size * config.moe_intermediate_size * experts + 2 * size * config.num_experts


def chunk_flops(head: Mapping[str, Any], size: int) -> float:
    """Operations of one chunk of actions, with all its draws, forward pass."""
    numbers, width = head["steps"] * head["entries"], head.get("width", 0)
    bins = 2.0 * size * numbers * head.get("insulate", 0)
    if head["loss"] != "flow":
        return 2.0 * size * numbers + bins
    each = (
        2 * numbers + 64 + width * (7 * head["depth"] + 2)
    )  # 64: the embedding of time; 7: a block and what adapts it
    return 2.0 * width * (size + head["draws"] * each) + bins


def embedder_flops(spec: dict[str, Any], size: int) -> float:
    """Operations of one embedded value, forward pass."""
    shape = spec["shape"]
    if spec["kind"] == "vector":
        return 2 * size * (int(np.prod(shape)) + size)
    if spec["kind"] == "tile":
        return 2 * size * (shape[0] * shape[1] * CHANNELS + size)
    convolution = 2 * 9 * CHANNELS * CHANNELS
    if spec["kind"] == "patch":
        cells = -(-shape[0] // 2) * -(-shape[1] // 2)
        return cells * (2 * 9 * shape[2] * CHANNELS + 2 * convolution + 2 * CHANNELS * size)
    stride = max(1, -(-max(shape[:2]) // 9))
    cells = -(-shape[0] // stride) * -(-shape[1] // stride)
    film = 4 * CHANNELS * size if "film" in spec else 0
    return film + shape[0] * shape[1] * convolution + cells * (convolution + 2 * CHANNELS * size)


def parameters(config: DecisionConfig) -> tuple[int, int]:
    """(number of parameters, number that each token uses): matrices of the layers and of the vocabulary, without embedders."""
    table = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    everything = active = float(table)
    for layer in range(config.num_hidden_layers):
        used = layer_flops(config, layer) / 2
        active += used
        idle = config.num_experts - config.num_experts_per_tok if config.has_experts(layer) else 0
        everything += used + idle * 3 * config.hidden_size * config.moe_intermediate_size
    return int(everything), int(active)
