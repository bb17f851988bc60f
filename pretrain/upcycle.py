"""Upcycling (Komatsuzaki et al. 2023): the MLPs of a dense model as the experts of a mixture.

Every expert is a copy of the dense MLP. The gates of a token add up to 1, so the mixture computes what the MLP did. With a shared
expert, that one is the copy, and what the others write begins at 0. `fresh` draws a share of each expert's inner columns again
(Drop-Upcycling, Nakamura et al. 2025), so that experts differ from the beginning, and the function is not kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.layers import named_generator
from tiphys.pretrain.weight_files import Weights

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

# Attributes of a config that say what its mixtures are
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_every", "first_dense", "shared_expert")


def is_upcycled(old: DecisionConfig, new: DecisionConfig) -> bool:
    """Whether a model with experts begins with a model that has none."""
    return bool(new.num_experts) and not old.num_experts


def upcycled_config(old: DecisionConfig, new: DecisionConfig) -> DecisionConfig:
    """The config of the dense model `old` if its layers had the experts of `new`.

    Raises DataError if a token passes through one expert only.
    """
    if new.num_experts_per_tok < 2:
        raise DataError(
            f"model.moe.experts_per_token: {new.num_experts_per_tok}: the gate of a single expert is its probability, which "
            "would scale what the dense model computes; a mixture that begins with a dense model needs at least 2"
        )
    out = copy.deepcopy(old)
    for name in _EXPERTS:
        setattr(out, name, getattr(new, name))
    out.moe_intermediate_size = old.intermediate_size
    return out


class UpcycledWeights:
    """The weights of a dense model, by the names that a mixture of experts has for them.

    Parameters
    ----------
    weights : Weights
        Of the dense model.
    config : DecisionConfig
        From `upcycled_config`.
    fresh : float
        Share of each expert's inner columns that is drawn.
    seed : int
        Of the columns and their values, with the names of layer and expert.
    """

    def __init__(self, weights: Weights, config: DecisionConfig, fresh: float = 0.0, seed: int = 0) -> None:
        self._weights, self._config, self._seed = weights, config, seed
        self._fresh = round(fresh * config.moe_intermediate_size)
        inner, size = config.moe_intermediate_size, config.hidden_size
        self.layers = [i for i in range(config.num_hidden_layers) if config.has_experts(i)]
        self._stacks: dict[str, str] = {}
        self._shared: dict[str, str] = {}
        shapes = dict(weights.shapes)
        for i in self.layers:
            for name, shape in (("up", (size, 2 * inner)), ("down", (inner, size))):
                dense = f"layers.{i}.mlp.{name}.weight"
                stack = f"layers.{i}.mlp.experts.{name}"
                shapes[stack], self._stacks[stack] = (config.num_experts, *shape), dense
                whole = shapes.pop(dense)
                if config.shared_expert:
                    shared = f"layers.{i}.mlp.shared.{name}.weight"
                    shapes[shared], self._shared[shared] = whole, dense
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """The rows [first, first + count) of a tensor; None: all from `first` on. Rows of a stack are experts."""
        if name not in self._stacks:
            return self._weights.read(self._shared.get(name, name), first, count)
        rows = self.shapes[name][0] - first if count is None else count
        if self._config.shared_expert and name.endswith(".down"):
            return torch.zeros(rows, *self.shapes[name][1:])
        dense = self._weights.read(self._stacks[name]).T
        out = dense.new_empty(rows, *dense.shape)
        out.copy_(dense)
        if self._fresh:
            spread = dense.float().std()
            stack, _, kind = name.rpartition(".")
            for i, expert in enumerate(out):
                self._redraw(expert, spread, stack, kind, first + i)
        return out

    def lines(self) -> list[str]:
        """What is upcycled, for people."""
        layers, config = ", ".join(map(str, self.layers)), self._config
        what = f"{config.num_experts} experts of each layer {layers} are copies of its dense MLP"
        if config.shared_expert:
            what = f"the shared expert of each layer {layers} is its dense MLP, and the other experts write 0"
        if self._fresh:
            what += f"; {self._fresh} of {config.moe_intermediate_size} inner columns of each are drawn"
        return [f"upcycled: {what}"] if self.layers else []

    def _redraw(self, expert: Tensor, spread: Tensor, stack: str, kind: str, number: int) -> None:
        """Draw the fresh columns of one expert's matrix: the same columns in `up`, for gate and for up, and in `down`."""
        inner = self._config.moe_intermediate_size
        columns = named_generator(self._seed, f"{stack}.fresh[{number}]").permutation(inner)[: self._fresh]
        place = torch.from_numpy(columns)
        random = named_generator(self._seed, f"{stack}.{kind}.fresh[{number}]")
        if kind == "down":
            shape = (self._fresh, self._config.hidden_size)
            expert[place] = (torch.from_numpy(random.standard_normal(shape, dtype="float32")) * spread).to(expert)
            return
        shape = (self._config.hidden_size, 2 * self._fresh)
        values = torch.from_numpy(random.standard_normal(shape, dtype="float32")) * spread
        expert[:, torch.cat([place, place + inner])] = values.to(expert)
