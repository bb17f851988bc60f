"""The end of the model: logits at the targets only, regressions, and the loss as one global sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.chunks import ChunkHead, make_head
from tiphys.pretrain.model.embedding import module_name
from tiphys.pretrain.model.layers import Linear, Module, Norm, only_acts
from tiphys.pretrain.model.targets import IDS, TARGETS, targets_of
from tiphys.pretrain.model.token_layout import TokenLayout

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig


SUMS = 5  # numbers of each task that `add_by_task` adds up


class Match(Module):
    """Unit vectors of windows and of texts, and how well each fits each (Radford et al. 2021; Fan et al. 2022).

    The logarithm of the inverse temperature is learned, from log(1 / 0.07) on and up to log 100.
    """

    def __init__(self, size: int, std: float) -> None:
        super().__init__()
        self.window, self.text = Linear(size, size, std=std), Linear(size, size, std=std)
        self.scale: nn.Parameter
        self.declare("scale", 1, fill=math.log(1 / 0.07))

    def forward(self, windows: Tensor, texts: Tensor) -> Tensor:
        """Normed hidden states [n, D] and [m, D] -> logits float32 [n, m]."""
        return _tempered(self.cosines(windows, texts), self.scale)

    def cosines(self, windows: Tensor, texts: Tensor) -> Tensor:
        """Normed hidden states [n, D] and [m, D] -> cosines of their vectors, float32 [n, m]."""
        return _cosines(self.window(windows), self.text(texts))

    def without_hooks(self, windows: Tensor, texts: Tensor) -> Tensor:
        """As `forward`, without a call of a module."""
        found = _cosines(F.linear(windows, self.window.weight), F.linear(texts, self.text.weight))
        return _tempered(found, self.scale)


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    return F.normalize(one.float(), dim=-1) @ F.normalize(other.float(), dim=-1).T


def _tempered(cosines: Tensor, scale: Tensor) -> Tensor:
    return cosines * scale.float().clamp(max=math.log(100)).exp()


class Head(Module):
    """The last norm, the regressed targets, the chunks of actions, and the pairs of windows and texts.

    Each regression head is a linear map.

    The error of a regression is squared and averaged over the dimensions, as in Chen et al. 2021.
    """

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        std = config.initializer_range
        self.tasks = max(1, len(config.tasks))
        self.norm = Norm(config.hidden_size, config.norm_epsilon)
        self.names = {name: module_name(name) for name in sorted(config.regressions)}
        self.chunk_names = {name: module_name(name) for name in sorted(config.chunks)}
        if any(len(set(names.values())) < len(names) for names in (self.names, self.chunk_names)):
            raise DataError(f"names of regression heads must differ in more than punctuation: {', '.join(self.names)}")
        self.regressions = nn.ModuleDict(
            {
                self.names[name]: Linear(config.hidden_size, config.regressions[name], std=std, bias=True)
                for name in self.names
            }
        )
        self.chunks = nn.ModuleDict(
            {
                self.chunk_names[name]: make_head(config.chunks[name], config.hidden_size, std)
                for name in self.chunk_names
            }
        )
        self.match = Match(config.hidden_size, std) if config.pairs else None

    def forward(self, x: Tensor, inputs: Mapping[str, Tensor], layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> normed [T, D]; this part of the loss [1]; sums by task float32 [tasks, SUMS] (see `add_by_task`)."""
        hidden = self.norm(x)
        # Every float that leaves a layer must have a gradient, so the sum begins with a zero that depends on x.
        loss = 0.0 * hidden[:1].float().sum(-1)
        sums = torch.zeros(self.tasks, SUMS, device=x.device)
        for name in self.names:
            targets = targets_of(inputs, f"regression/{name}")
            if targets is None:
                if not only_acts():  # a gradient of every parameter in every backward pass
                    loss = loss + 0.0 * self.predict(hidden[:1], name).sum()
                continue
            error = TARGETS["regression"].losses(self.predict(hidden[targets.place], name), targets.payload, 0)
            loss = loss + (error * targets.weight).sum() / layout.divisors[0]
            add_by_task(sums, targets.task, error, targets.weight)
        for name in self.chunk_names:
            loss = loss + self._chunks(name, hidden, inputs, layout, sums)
        if self.match is not None:
            loss = loss + self._pairs(hidden, inputs, layout, sums)
        return hidden, loss, sums

    def _chunks(
        self, name: str, hidden: Tensor, inputs: Mapping[str, Tensor], layout: TokenLayout, sums: Tensor
    ) -> Tensor | float:
        """The part of the loss that chunks of one head have, [1]. Adds to the sums by task."""
        head, targets = self.chunk_head(name), targets_of(inputs, f"chunks/{name}")
        if targets is None:
            return 0.0 if only_acts() else 0.0 * head(hidden[:1], head.empty(hidden.device)).sum()
        losses = head(hidden[targets.place], targets.payload)
        add_by_task(sums, targets.task, losses, targets.weight)
        return (losses * targets.weight).sum() / layout.divisors[0]

    def _pairs(self, hidden: Tensor, inputs: Mapping[str, Tensor], layout: TokenLayout, sums: Tensor) -> Tensor:
        """The part of the loss that pairs have, [1]. Adds to the sums by task."""
        assert self.match is not None
        targets = targets_of(inputs, "pairs/match")
        if targets is None:
            return 0.0 * self.match(hidden[:1], hidden[:1]).sum()
        logits = self.match(hidden[targets.place], hidden[targets.payload[:, 0]])
        losses = TARGETS["pairs"].losses(logits, targets.payload, 0)
        add_by_task(sums, targets.task, losses, targets.weight)
        return (losses * targets.weight).sum() / layout.divisors[0]

    def predict(self, hidden: Tensor, name: str) -> Tensor:
        """Normed hidden states [n, D] -> float32 [n, d]."""
        return self.regressions[self.names[name]](hidden).float()

    def chunk_head(self, name: str) -> ChunkHead:
        """The head of this name that predicts chunks of actions."""
        head = self.chunks[self.chunk_names[name]]
        assert isinstance(head, ChunkHead)
        return head


class Output(Module):
    """The output matrix [vocab, D]. Softmax 0 is over all rows, softmax i over the rows of ranges[i − 1]."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        self.weight: nn.Parameter
        self.declare("weight", config.vocab_size, config.hidden_size, std=config.initializer_range)
        self.bounds = output_bounds(config)
        self.text = next(((int(low), int(high)) for name, low, high in config.ranges if name == "text"), (0, 0))

    def forward(
        self, hidden: Tensor, loss: Tensor, sums: Tensor, inputs: Mapping[str, Tensor], layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """The whole loss (a scalar) and the sums by task, [tasks, SUMS]."""
        return output_loss(self.weight, self.bounds, self.text, hidden, loss, sums, inputs, layout)


def output_bounds(config: DecisionConfig) -> list[tuple[int, int]]:
    """[low, high) ids of each softmax: the whole vocabulary, then every range."""
    return [(0, config.vocab_size), *((int(low), int(high)) for _, low, high in config.ranges)]


def output_loss(
    weight: Tensor,
    bounds: list[tuple[int, int]],
    text: tuple[int, int],
    hidden: Tensor,
    loss: Tensor,
    sums: Tensor,
    inputs: Mapping[str, Tensor],
    layout: TokenLayout,
) -> tuple[Tensor, Tensor]:
    """Add Σ weight · cross-entropy ÷ normaliser, in float32, to `loss` [1]. Returns the scalar and the sums by task.

    bounds, text  [low, high) ids of each softmax, and of texts
    """
    total, any_target = loss.sum(), False
    for kind, i in ((kind, i) for kind in IDS for i in range(len(bounds))):
        targets, (low, high) = targets_of(inputs, f"{kind}/{i}"), bounds[i]
        if targets is None:
            continue
        logits = F.linear(hidden[targets.place], weight[low:high]).float()
        losses = TARGETS[kind].losses(logits, targets.payload, low)
        total = total + (losses * targets.weight).sum() / layout.divisors[0]
        said = (targets.payload[:, 0] >= text[0]) & (targets.payload[:, 0] < text[1])
        sums = add_by_task(sums, targets.task, losses, targets.weight, said)
        any_target = True
    if not any_target:
        total = total + 0.0 * (weight[0] * hidden[0]).sum().float()
    return total, sums


@torch.no_grad()
def add_by_task(sums: Tensor, task: Tensor, losses: Tensor, weights: Tensor, said: Tensor | None = None) -> Tensor:
    """Add to sums [tasks, SUMS], for each task: Σ weight · loss, Σ loss, number of targets; Σ loss and number of those of them
    that are tokens of a text.

    said  bool [n]: the targets that are; None: none
    """
    losses, ones = losses.detach(), torch.ones_like(losses)
    text = torch.zeros_like(losses) if said is None else said.to(losses.dtype)
    columns = torch.stack([losses * weights, losses, ones, losses * text, text], -1)
    return sums.index_add_(0, task, columns)
