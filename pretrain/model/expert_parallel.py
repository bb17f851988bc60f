"""Experts divided among ranks under DeepSpeed: each rank keeps a slice of every expert layer, and tokens are sent to it.

DeepSpeed recognises an expert layer by `isinstance(module, MoE)`, and its parameters by `allreduce` and `group_name`. It then
averages their gradients over the ranks that hold the same slice, and other gradients over all ranks. The parameters keep the
names of the whole model, `….experts.up` and `….experts.down`; they hold the experts from number `first` on.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from tiphys.pretrain.model.moe import Experts, mixtures

if TYPE_CHECKING:
    from tiphys.pretrain.distributed.spans import Spans
    from tiphys.pretrain.model.config import DecisionConfig


class ShardedExperts(MoE, Experts):
    """Experts [first, first + count) of a layer. The `size` ranks of a group together hold all experts.

    `MoE.__init__` is not called: it would build DeepSpeed's own gate and experts.
    """

    def __init__(self, config: DecisionConfig, rank: int, size: int) -> None:
        if config.num_experts % size:
            raise ValueError(
                f"parallel.expert: {size} does not divide {config.num_experts} experts (model.moe.experts)"
            )
        count = config.num_experts // size
        Experts.__init__(self, config, count, rank * count)
        self.num_experts, self.num_local_experts = config.num_experts, count
        self.first, self.ep_size = rank * count, size
        self.group: Any = None
        self.spans: Spans | None = None  # if set, all-to-all exchanges are timed
        _mark(self)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by `deepspeed.initialize`."""
        self.group = _group(self.ep_size, use_data_before_expert_parallel_)
        rank = dist.get_rank(self.group)
        if rank * self.num_local_experts != self.first:
            raise RuntimeError(
                f"rank {dist.get_rank()} holds the experts from number {self.first} on, but is number {rank} of its expert group"
            )

    @torch.compiler.disable
    def prepare(self, counts: Tensor) -> Sizes:
        """Exchange the numbers of rows for each expert, counts int64 [E], within the group. Collective over the group."""
        sent = counts.view(self.ep_size, self.num_local_experts)
        received = torch.empty_like(sent)
        with nullcontext() if self.spans is None else self.spans.span():
            dist.all_to_all_single(received, sent, group=self.group)
        return Sizes(received, torch.stack([sent.sum(1), received.sum(1)]))

    @torch.compiler.disable
    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        """x [N, D] sorted by expert of the whole layer, and the result of `prepare` -> [N, D]. Collective over the group."""
        outgoing, incoming = sizes.wait()
        received = sizes.received
        rows = _AllToAll.apply(x, incoming, outgoing, self.group, self.spans)
        # Received rows are sorted by sender, then by expert. Grouped products need them sorted by expert.
        kind = torch.arange(self.num_local_experts, device=x.device).repeat(self.ep_size)
        order = kind.repeat_interleave(received.view(-1), output_size=sum(incoming)).argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        made = Experts.forward(self, rows.index_select(0, order), received.sum(0))
        return _AllToAll.apply(made.index_select(0, inverse), outgoing, incoming, self.group, self.spans)


class Sizes:
    """Numbers of rows, on their way to the host, which needs them to exchange rows. `wait` is an expert layer's only wait.

    received  int64 [ranks, experts of this rank], on the device: rows that arrive from each rank for each expert
    """

    def __init__(self, received: Tensor, both: Tensor) -> None:
        """both: int64 [2, ranks], numbers of rows sent to each rank, and received from each rank."""
        self.received, self._copied = received, None
        if both.is_cuda:
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = both

    def wait(self) -> tuple[list[int], list[int]]:
        """Rows to each rank, and rows from each rank. On CUDA the device keeps working on what was queued meanwhile."""
        if self._copied is not None:
            self._copied.synchronize()
        outgoing, incoming = self._host.tolist()
        return outgoing, incoming


class NoExperts(MoE):
    """A placeholder for a rank without experts to train, for example a pipeline stage of dense layers.

    All ranks must create DeepSpeed's expert groups together, and the gradient norm is summed over the stages once for each
    group of parameters. A stage without an expert parameter would make the others wait forever. This parameter is never used,
    stays zero and is not saved.
    """

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size = size, size
        self.placeholder = nn.Parameter(torch.zeros(size))
        vars(self.placeholder)["placeholder"] = True  # for `deepspeed_state.fragments`
        _mark(self)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by `deepspeed.initialize`."""
        _group(self.ep_size, use_data_before_expert_parallel_)


def _mark(layer: ShardedExperts | NoExperts) -> None:
    """Tell DeepSpeed which ranks average the gradients of these parameters."""
    for parameter in layer.parameters():
        vars(parameter).update(allreduce=False, group_name=f"ep_size_{layer.ep_size}")


def _group(size: int, data_first: bool) -> Any:
    """This rank's expert group of this size; created, on all ranks, if it does not exist yet."""
    name = f"ep_size_{size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size, use_data_before_expert_parallel_=data_first)
    return groups._get_expert_parallel_group(name)


class _AllToAll(torch.autograd.Function):
    """Exchange rows of x within a group: `outgoing` rows to each rank, `incoming` from each. Gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, incoming: list[int], outgoing: list[int], group: Any, spans: Spans | None
    ) -> Tensor:
        ctx.incoming, ctx.outgoing, ctx.group, ctx.spans = incoming, outgoing, group, spans
        return _exchange(x, incoming, outgoing, group, spans)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _exchange(gradient, ctx.outgoing, ctx.incoming, ctx.group, ctx.spans), None, None, None, None


def _exchange(x: Tensor, incoming: list[int], outgoing: list[int], group: Any, spans: Spans | None) -> Tensor:
    out = x.new_empty(sum(incoming), x.shape[1])
    with nullcontext() if spans is None else spans.span():
        dist.all_to_all_single(out, x.contiguous(), incoming, outgoing, group=group)
    return out


@torch.no_grad()
def shard_experts(module: nn.Module, config: DecisionConfig, rank: int, size: int) -> None:
    """Replace every expert layer of a model or a stage by this rank's slice of it. Call it before `deepspeed.initialize`.

    rank  number of this rank in its expert group (`ParallelDims.expert_rank`)
    size  number of ranks in the group (`parallel.expert`)
    """
    for mixture in mixtures(module):
        whole = mixture.experts
        if isinstance(whole, ShardedExperts):
            raise RuntimeError(f"layer {mixture.number}: its experts are divided already; call shard_experts once")
        part = ShardedExperts(config, rank, size)
        for name in ("up", "down"):
            full, own = getattr(whole, name), getattr(part, name)
            own.data = full[part.first : part.first + part.num_local_experts].clone()
            own.requires_grad_(full.requires_grad)
        mixture.experts = part
    if not any(p.requires_grad for mixture in mixtures(module) for p in mixture.experts.parameters()):
        module.add_module("no_experts", NoExperts(size))
