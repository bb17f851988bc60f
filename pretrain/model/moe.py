"""Mixture of experts: top-k routing that drops no token; its losses do not depend on which rank computes which row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiphys.pretrain.model.layers import Mlp, Module, cuda_capability, gated, only_acts
from tiphys.pretrain.model.token_layout import TokenLayout
from tiphys.pretrain.tokens.batch import MODALITIES

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig


class Router(Module):
    """Logits over the experts in float32: x Rᵀ, plus learned biases of the token's modality and task if the config has them."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        self.modality: nn.Parameter
        self.task: nn.Parameter
        self.weight: nn.Parameter
        self.sees_modality, self.sees_task = config.router_modality, config.router_task
        self.declare("weight", config.num_experts, config.hidden_size, std=config.initializer_range)
        if self.sees_modality:
            self.declare("modality", len(MODALITIES), config.num_experts)
        if self.sees_task:
            self.declare("task", len(config.tasks) + 1, config.num_experts)  # 0: the task is hidden

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        logits = F.linear(x.float(), self.weight.float())
        if self.sees_modality:
            logits = logits + F.embedding(layout.modality, self.modality.float())
        if self.sees_task:
            logits = logits + F.embedding(layout.route, self.task.float())
        return logits


class Experts(Module):
    """E gated MLPs (SwiGLU) as two stacks of matrices: up [E, D, 2F] (gate and up) and down [E, F, D]."""

    def __init__(self, config: DecisionConfig, count: int = 0, first: int = 0) -> None:
        """Hold `count` experts, beginning with number `first`. count = 0: all experts."""
        super().__init__()
        size, inner = config.hidden_size, config.moe_intermediate_size
        count = count or config.num_experts
        self.up: nn.Parameter
        self.down: nn.Parameter
        std, whole = config.initializer_range, config.num_experts
        self.declare("up", count, size, 2 * inner, std=std, first=first, whole=whole)
        self.declare("down", count, inner, size, std=config.residual_std, first=first, whole=whole)

    def forward(self, x: Tensor, counts: Any) -> Tensor:
        """x [N, D] sorted by expert, and counts int64 [E], the rows of each expert -> [N, D]."""
        ends = counts.cumsum(0).to(torch.int32)
        return products(gated(products(x, self.up, counts, ends)), self.down, counts, ends)


def products(x: Tensor, weights: Tensor, counts: Tensor, ends: Tensor) -> Tensor:
    """x [N, A] sorted by expert, weights [E, A, B] -> [N, B]: each row times the matrix of its expert."""
    if not has_grouped_mm(x, weights):
        return looped_products(x, weights, counts)
    if torch.compiler.is_compiling() and x.dtype == torch.bfloat16:  # the only type that the compiler supports
        return F.grouped_mm(x, weights, offs=ends)
    return _aligned_grouped_mm(x, weights, ends)


@torch.compiler.disable
def _aligned_grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if weights.data_ptr() % 16:  # ZeRO packs parameters without alignment
        weights = weights.clone()
    return F.grouped_mm(x, weights, offs=ends)


def has_grouped_mm(x: Tensor, weights: Tensor) -> bool:
    """Whether PyTorch's grouped product (2.10) works here: rows of n · 16 bytes; on CUDA only bfloat16 on Hopper and later."""
    aligned = all(n * x.element_size() % 16 == 0 for n in weights.shape[1:])
    if not aligned or x.shape[0] == 0 or not hasattr(F, "grouped_mm"):  # no rows: a rank without tokens
        return False
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and cuda_capability(x.device.index) >= (9, 0)
    return x.dtype in (torch.float32, torch.bfloat16)


def looped_products(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """`products` expert by expert: the test oracle, and the fallback without a grouped product. Waits for `counts`."""
    parts = zip(x.split(counts.tolist()), weights.unbind(), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])


class _Gather(torch.autograd.Function):
    """x[index], with each row of x taken `times` times; `inverse` [len(x) · times] says where. The backward pass gathers too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.times = times
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        out = gradient.index_select(0, inverse)
        if ctx.times > 1:
            out = out.view(-1, ctx.times, gradient.shape[1]).sum(1)
        return out, None, None, None


class AuxiliaryGradient(torch.autograd.Function):
    """Identity on `x`. In the backward pass `loss` gets the gradient 1, as if it had been added to the real loss.

    The auxiliary loss then trains the router without being passed through the pipeline stages, and the reported loss has no
    auxiliary terms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class MixtureOfExperts(Module):
    """Top-k experts for each token. Gates are softmax probabilities renormalised over the k; for k = 1 the probability itself.

    The balance loss is E · Σ_e f_e · P_e (Shazeer et al. 2017; Fedus et al. 2022). f_e comes from `previous`, the *global*
    counts of the previous step; P_e is a sum over tokens divided by the global number of tokens. The z-loss (Zoph et al. 2022)
    is divided by the same number. So neither depends on which rank computes which row. With `bias_rate` > 0 there is no balance
    loss: a bias on the choice of experts (not on the gates) moves by that much in each step (Wang et al. 2024).

    previous    int64 [E], saved: tokens routed to each expert in the previous step, over all ranks
    bias_steps  int64 [E], saved: the bias in multiples of `bias_rate` (integers survive a cast of the model to bfloat16)
    counts      int64 [tasks, E]: tokens of this step so far on this rank; the engine sums it and calls `finish_step`
    losses      float32 [2]: balance loss and z-loss of this step so far on this rank, times their coefficients
    """

    previous: Tensor
    bias_steps: Tensor

    def __init__(self, config: DecisionConfig, number: int) -> None:
        super().__init__()
        self.number, self.experts_per_token = number, config.num_experts_per_tok
        self.num_experts, self.tasks = config.num_experts, max(1, len(config.tasks))
        self.balance = 0.0 if config.bias_rate else config.balance
        self.z_loss, self.bias_rate = config.z_loss, config.bias_rate
        self.router = Router(config)
        self.experts: nn.Module = Experts(config)
        self.shared = Mlp(config, config.moe_intermediate_size) if config.shared_expert else None
        self.register_buffer("previous", torch.ones(config.num_experts, dtype=torch.int64))
        self.register_buffer("bias_steps", torch.zeros(config.num_experts, dtype=torch.int64))
        self.counts: Tensor | None = None
        self.losses: Tensor | None = None

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """x [T, D] -> [T, D]."""
        logits = self.router(x, layout)
        probabilities = logits.softmax(-1)
        with torch.no_grad():
            score = probabilities + self.bias_rate * self.bias_steps if self.bias_rate else probabilities
            chosen = score.topk(self.experts_per_token, sorted=False).indices  # [T, k]
        # Experts that are divided among ranks begin to exchange counts here. Others, and those that another library wraps, do not
        prepare = getattr(self.experts, "prepare", lambda counts: counts)
        prepared = prepare(self._count(chosen))
        gates = probabilities.gather(1, chosen)
        if self.experts_per_token > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        if not only_acts():  # a policy that acts needs no losses
            losses = self._losses(logits, probabilities, layout)
            layout.auxiliary[self.number] = losses.detach()
            if torch.is_grad_enabled():
                gates = AuxiliaryGradient.apply(gates, losses.sum() * layout.divisors[2])
            if self.training and layout.first_pass(self.number):
                self._observe(chosen, losses, layout)
        # If experts are divided among ranks, the shared expert works while the ranks exchange their numbers of tokens.
        shared = None if self.shared is None else self.shared(x)
        out = self.mix(x, chosen, gates.to(x.dtype), prepared)
        return out if shared is None else out + shared

    def _count(self, chosen: Tensor) -> Tensor:
        """int64 [E]: number of rows of each expert."""
        expert = chosen.reshape(-1)
        return torch.zeros_like(self.previous).scatter_add_(0, expert, torch.ones_like(expert))

    def mix(self, x: Tensor, chosen: Tensor, gates: Tensor, prepared: Any) -> Tensor:
        """Σ_k gate · expert(x), x [T, D] -> [T, D]. Tokens are sorted by expert, multiplied in groups, and gathered back."""
        tokens, k = chosen.shape
        expert = chosen.reshape(-1)
        order = expert.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = self.experts(_Gather.apply(x, order // k, inverse, k), prepared)
        y = _Gather.apply(y, inverse, order, 1).view(tokens, k, -1)
        return (y * gates[..., None]).sum(1)

    def _losses(self, logits: Tensor, probabilities: Tensor, layout: TokenLayout) -> Tensor:
        """float32 [2]: balance loss and z-loss of these tokens, times their coefficients."""
        real, tokens = layout.real.to(logits.dtype), layout.divisors[1]
        share = self.previous.float() / self.previous.sum().clamp(min=1)
        balance = ((real @ probabilities) @ share) * (self.num_experts * self.balance) / tokens
        z = (logits.logsumexp(-1).square() @ real) * self.z_loss / tokens
        return torch.stack([balance, z])

    @torch.no_grad()
    def _observe(self, chosen: Tensor, losses: Tensor, layout: TokenLayout) -> None:
        if self.counts is None or self.losses is None:
            self.counts = torch.zeros(self.tasks, self.num_experts, dtype=torch.int64, device=chosen.device)
            self.losses = torch.zeros(2, device=chosen.device)
        place = layout.task[:, None] * self.num_experts + chosen
        ones = layout.real[:, None].expand_as(place).to(torch.int64)
        self.counts.view(-1).scatter_add_(0, place.reshape(-1), ones.reshape(-1))
        self.losses += losses

    @torch.no_grad()
    def finish_step(self, counts: Tensor) -> None:
        """End a step: keep its global counts ([tasks, E] or [E]), move the bias, and reset this rank's counts."""
        total = counts.reshape(-1, self.num_experts).sum(0)
        if self.bias_rate:
            self.bias_steps += (total.sum() - total * self.num_experts).sign()
        if total.sum() > 0:
            self.previous.copy_(total)
        self.counts = self.losses = None


def mixtures(module: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts of a model or a pipeline stage, in the order of their layers."""
    return sorted((m for m in module.modules() if isinstance(m, MixtureOfExperts)), key=lambda m: m.number)


def step_counts(module: nn.Module, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """What this rank counted in this step: counts int64 [layers, tasks, E] and losses float32 [layers, 2].

    The engine sums the counts over all ranks and passes each layer its part through `finish_step`.
    """
    found = mixtures(module)
    if not found:
        return torch.zeros(0, 1, 0, dtype=torch.int64, device=device), torch.zeros(0, 2, device=device)
    counts, losses = [], []
    for m in found:
        empty = torch.zeros(m.tasks, m.num_experts, dtype=torch.int64, device=device)
        counts.append(empty if m.counts is None else m.counts.to(device))
        losses.append(torch.zeros(2, device=device) if m.losses is None else m.losses.to(device))
    return torch.stack(counts), torch.stack(losses)
