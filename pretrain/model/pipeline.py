"""The model's layers as pipeline stages: the same classes, but `forward` takes and returns a tuple of tensors.

Exactly two tensors are sent between stages: the hidden states [T, D], which have a gradient, and an int32 *cargo* with
everything else (windows, attributes, targets, divisors of the loss). Only one of them is float, because every float tensor
gets a backward pass of its own, which would add the auxiliary gradients twice. It comes first, because DeepSpeed reuses its
receive buffers by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiphys.pretrain.distributed.layout_errors import stage_errors
from tiphys.pretrain.model.embedding import Embedding, TokenTable
from tiphys.pretrain.model.flops import chunk_flops, layer_flops
from tiphys.pretrain.model.heads import Head, Output
from tiphys.pretrain.model.inputs import Inputs, missing, scalars, to_device
from tiphys.pretrain.model.layers import Module
from tiphys.pretrain.model.targets import target_names
from tiphys.pretrain.model.token_layout import TokenLayout
from tiphys.pretrain.model.transformer import Block, build_layers

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

ENDS = 2  # layers before the first block (token, embedding), and after the last one (head, output)


def cargo_names(config: DecisionConfig) -> list[str]:
    """Names of the tensors in a cargo, in their order."""
    return ["windows", "attributes", "scalars", *target_names(config)]


def own_names(config: DecisionConfig) -> list[str]:
    """Names of the inputs that only the first stage needs, in their order."""
    names = ["tokens", "local", "timestep"]
    for name, spec in sorted(config.embedders.items()):
        names += [
            f"embedded/{name}/{key}" for key in ("index", "value", "place", *(("text",) if "film" in spec else ()))
        ]
    if any("film" in spec for spec in config.embedders.values()):
        names += [f"texts/{key}" for key in ("place", "number", "size")]
    return names


def pipeline_inputs(
    inputs: Mapping[str, Tensor],
    config: DecisionConfig,
    normaliser: Tensor | float = 1.0,
    tokens_global: Tensor | float = 1.0,
    auxiliary_scale: Tensor | float = 1.0,
) -> tuple[Tensor, ...]:
    """The first stage's input for one micro-batch, from `to_tensors`' dictionary and the arguments of `DecisionModel.forward`."""
    device = inputs["attributes"].device
    numbers = scalars(normaliser, tokens_global, auxiliary_scale, device).view(1, -1)
    parts = []
    for name in cargo_names(config):
        part = numbers if name == "scalars" else inputs.get(name)
        parts.append(missing(name, config, device) if part is None else to_device(part, device))
    header = to_device(torch.tensor([size for part in parts for size in part.shape], dtype=torch.int32), device)
    cargo = torch.cat([header, *(part.reshape(-1) for part in parts)])
    own = (inputs.get(name) for name in own_names(config))
    return cargo, *(missing(n, config, device) if t is None else t for n, t in zip(own_names(config), own, strict=True))


def unload(cargo: Tensor, config: DecisionConfig) -> tuple[Inputs, TokenLayout]:
    """The named tensors of a cargo, and its layout. The layers of a stage share the result.

    The host needs to know shapes and windows, so a CUDA stage waits for its queue once in each micro-batch.
    """
    known = getattr(cargo, "_unloaded", None)
    if known is None:
        names = cargo_names(config)
        shapes = cargo[: 2 * len(names)].view(-1, 2).tolist()
        flat = cargo[2 * len(names) :].split([rows * columns for rows, columns in shapes])
        parts = {name: t.view(shape) for name, t, shape in zip(names, flat, shapes, strict=True)}
        layout = TokenLayout(parts.pop("windows").cpu(), parts.pop("attributes"), parts.pop("scalars").view(-1))
        known = parts, layout
        cargo._unloaded = known  # type: ignore[attr-defined]
    return known


class TokenStage(TokenTable):
    def __init__(self, config: DecisionConfig) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        cargo, tokens, *rest = tensors
        return super().forward(tokens), cargo, *rest


class EmbeddingStage(Embedding):
    def __init__(self, config: DecisionConfig) -> None:
        super().__init__(config)
        self.own = own_names(config)[1:]

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, cargo, *rest = tensors
        return super().forward(x, dict(zip(self.own, rest, strict=True))), cargo


class BlockStage(Block):
    def __init__(self, config: DecisionConfig, number: int) -> None:
        super().__init__(config, number)
        self.config = config

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, cargo = tensors
        _, layout = unload(cargo, self.config)
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, x, layout, use_reentrant=False), cargo
        return super().forward(x, layout), cargo


class HeadStage(Head):
    """Returns more than one float tensor, so it must be on the same stage as the output; `partition` keeps them together."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, cargo = tensors
        return *super().forward(x, *unload(cargo, self.config)), cargo


class OutputStage(Output):
    """Returns the loss, a scalar. `loss_by_task` [tasks, SUMS] adds micro-batches up until `take_loss_by_task` is called."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__(config)
        self.config = config
        self.loss_by_task: Tensor | None = None

    def forward(self, tensors: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
        hidden, loss, sums, cargo = tensors
        total, sums = super().forward(hidden, loss, sums, *unload(cargo, self.config))
        self.loss_by_task = sums if self.loss_by_task is None else self.loss_by_task + sums
        return total

    def take_loss_by_task(self) -> Tensor | None:
        """The sum over the micro-batches since the last call; None if there was none."""
        taken, self.loss_by_task = self.loss_by_task, None
        return taken


_STAGES: dict[type[Module], type[Module]] = {
    TokenTable: TokenStage,
    Embedding: EmbeddingStage,
    Block: BlockStage,
    Head: HeadStage,
    Output: OutputStage,
}


def pipeline_layers(config: DecisionConfig) -> list[tuple[type[Module], tuple[Any, ...]]]:
    """(class, arguments) of every layer, in order, for `deepspeed.pipe.LayerSpec`."""
    return [(_STAGES[kind], arguments) for _, kind, arguments in build_layers(config)]


def canonical_name(name: str, config: DecisionConfig) -> str:
    """Name in the plain model of a parameter or buffer of a `PipelineModule`: `5.attention…` -> `layers.3.attention…`."""
    if name.startswith("tied_modules."):
        return name.removeprefix("tied_modules.")
    number, _, rest = name.partition(".")
    return f"{build_layers(config)[int(number)][0]}.{rest}"


def layer_operations(config: DecisionConfig, window: int = 256, targets: float = 0.3) -> list[float]:
    """Operations per token of every layer, forward. `window`: tokens in a window; `targets`: share of tokens with a target."""
    attention = 2 * window * config.num_attention_heads * config.head_size
    blocks = [layer_flops(config, i) + attention for i in range(config.num_hidden_layers)]
    chunks = targets * sum(chunk_flops(head, config.hidden_size) for head in config.chunks.values())
    return [0.0, 0.0, *blocks, chunks, targets * 2 * config.hidden_size * config.vocab_size]


def partition(config: DecisionConfig, stages: int, *, costs: Sequence[float] | None = None) -> list[int]:
    """Bounds [0, …, number of layers] of the stages that make the most expensive stage as cheap as possible.

    Every stage has at least one block. `costs` has a number for every layer, in any unit; None: `layer_operations`. Raises
    ValueError if there are more stages than blocks.
    """
    costs = list(layer_operations(config) if costs is None else costs)
    blocks = config.num_hidden_layers
    cost = [0.0, *costs[ENDS : ENDS + blocks]]
    cost[1] += sum(costs[:ENDS])
    cost[-1] += sum(costs[ENDS + blocks :])
    sums = [sum(cost[: i + 1]) for i in range(blocks + 1)]
    for _, reason in stage_errors(stages, blocks):
        raise ValueError(reason)

    # best[j]: the smallest possible maximum if the stages so far hold the blocks before j, and the bounds of these stages
    best: list[tuple[float, list[int]]] = [(0.0, [0])] + [(float("inf"), [])] * blocks
    for _ in range(stages):
        best = [
            min(
                ((max(best[i][0], sums[j] - sums[i]), [*best[i][1], j]) for i in range(j) if best[i][1]),
                default=(float("inf"), []),
            )
            for j in range(blocks + 1)
        ]
    inner = best[blocks][1][1:-1]
    return [0, *(ENDS + j for j in inner), ENDS + blocks + ENDS]
