"""Speed of the model's forward and backward pass, side by side in one run.

    python benchmarks/train.py --hidden 512 --tokens 4096 --json FILE

Three models of one shape (every layer a mixture of experts, SwiGLU, top-k, no shared expert) train on the same tokens with
AdamW: ours; ours with `deepspeed.moe.layer.MoE` in place of our expert layer; `transformers`' Mixtral. Rounds alternate, so
that a busy machine slows all of them. The rates are medians; `share` is the useful operations a second over the machine's own
rate for one matrix product of the layer's shape, measured between the rounds. The losses show that all three learn alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.batch import TEXT, TokenBatch
from pretrain.model.config import DecisionConfig
from pretrain.model.flops import flops_per_batch
from pretrain.model.inputs import to_tensors
from pretrain.model.moe import mixtures
from pretrain.model.transformer import DecisionModel

VOCABULARY = 2048


def make_batch(rows: int, context: int, seed: int) -> TokenBatch:
    """Rows of one full window each; the next token is the last one plus a small, learnable step."""
    g = np.random.default_rng(seed)
    tokens = (g.integers(VOCABULARY, size=(rows, 1)) + np.cumsum(g.integers(1, 4, (rows, context + 1)), 1)) % VOCABULARY
    shape, ones = (rows, context), np.ones((rows, context), np.int32)
    return TokenBatch(
        step=0,
        row=np.arange(rows),
        tokens=tokens[:, :-1].astype(np.int32),
        modality=np.full(shape, TEXT, np.uint8),
        segment=ones,
        position=np.tile(np.arange(context, dtype=np.int32), (rows, 1)),
        local=np.zeros(shape, np.int32),
        timestep=np.zeros(shape, np.int32),
        task=np.zeros(shape, np.int32),
        causal=np.ones(shape, bool),
        target=tokens[:, 1:].astype(np.int32),
        softmax=np.zeros(shape, np.uint8),
        weight=np.ones(shape, np.float32),
    )


def make_ours(config: DecisionConfig, options: argparse.Namespace) -> tuple[nn.Module, Callable[[TokenBatch], Tensor]]:
    model = DecisionModel(config).to(options.device, options.dtype).train()
    return model, lambda batch: model(to_tensors(batch, options.device), batch.targets, batch.real_tokens).loss


class DeepSpeedMixture(nn.Module):
    """DeepSpeed's layer behind the signature of ours; dropless, because ours is."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        from pretrain.model.layers import Mlp

        self.moe = MoE(
            config.hidden_size,
            Mlp(config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers),
            num_experts=config.num_experts,
            k=config.num_experts_per_tok,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: Tensor, layout: Any) -> Tensor:
        return self.moe(x)[0]


def make_deepspeed(
    config: DecisionConfig, options: argparse.Namespace
) -> tuple[nn.Module, Callable[[TokenBatch], Tensor]]:
    import deepspeed
    import deepspeed.ops

    from pretrain.model.layers import initialise

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if options.device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if options.device == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    model = DecisionModel(config)
    for block in model.layers:
        block.mlp = DeepSpeedMixture(config)
        block.mlp.moe.set_deepspeed_parallelism()
    initialise(model, 0)
    model = model.to(options.device, options.dtype).train()
    for module in model.modules():
        if type(module).__name__ == "TopKGate":
            module.wg.float()  # its gate computes in float32
    return model, lambda batch: model(to_tensors(batch, options.device), batch.targets, batch.real_tokens).loss


def make_mixtral(
    config: DecisionConfig, options: argparse.Namespace
) -> tuple[nn.Module, Callable[[TokenBatch], Tensor]]:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            max_position_embeddings=options.context,
        )
    )
    model = model.to(options.device, options.dtype).train()

    def loss(batch: TokenBatch) -> Tensor:
        tokens, target = (torch.from_numpy(t).long().to(options.device) for t in (batch.tokens, batch.target))
        logits = model(input_ids=tokens, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    return model, loss


MAKERS = {"ours": make_ours, "deepspeed": make_deepspeed, "mixtral": make_mixtral}


def matrix_rate(options: argparse.Namespace) -> float:
    """Operations a second of one product of the layer's shape, forward only."""
    a = torch.randn(options.tokens, options.hidden, device=options.device, dtype=options.dtype)
    b = torch.randn(options.hidden, 4 * options.hidden, device=options.device, dtype=options.dtype)
    seconds, _ = timed(lambda: a @ b, options.device)
    return 2 * a.shape[0] * b.numel() / seconds


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape = {"hidden": 512, "layers": 4, "experts": 8, "k": 2, "tokens": 4096, "context": 256, "rounds": 7}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    return options


def make_config(options: argparse.Namespace) -> DecisionConfig:
    return DecisionConfig(
        vocab_size=VOCABULARY,
        tasks=["text"],
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        num_experts=options.experts,
        num_experts_per_tok=options.k,
        moe_every=1,
    )


@dataclass
class Method:
    model: nn.Module
    loss: Callable[[TokenBatch], Tensor]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, batch: TokenBatch, device: str, warm: bool) -> None:
        """One optimizer step; the time is that of the forward and backward pass."""

        def work() -> Tensor:
            value = self.loss(batch)
            value.backward()
            return value.detach()

        seconds, value = timed(work, device)
        for mixture in mixtures(self.model):
            if mixture.counts is not None:
                mixture.finish_step(mixture.counts)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(value))
        if warm:
            self.seconds.append(seconds)


def main() -> None:
    options = parse()
    config, rows, rates = make_config(options), options.tokens // options.context, []
    methods = {}
    for name in options.methods:
        model, loss = MAKERS[name](config, options)
        methods[name] = Method(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step in range(options.rounds + 1):
        batch = make_batch(rows, options.context, step)
        for method in methods.values():
            method.step(batch, options.device, warm=step > 0)
        rates.append(matrix_rate(options))
    flops, rate = flops_per_batch(config, batch), statistics.median(rates[1:])
    report: dict[str, Any] = {
        "shape": {k: str(v) for k, v in vars(options).items() if k not in ("json", "methods")},
        "threads": torch.get_num_threads(),
        "matrix_gflops": rate / 1e9,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "methods": {},
    }
    print(
        f"{options.tokens} tokens a step, hidden {options.hidden}, {options.experts} experts, k = {options.k}, {options.dtype}"
    )
    print(f"one matrix product: {rate / 1e9:.0f} GFLOP/s")
    for name, method in methods.items():
        seconds = statistics.median(method.seconds)
        row = {
            "tokens_per_second": options.tokens / seconds,
            "gflops": flops / seconds / 1e9,
            "share": flops / seconds / rate,
            "first_loss": method.losses[0],
            "last_loss": method.losses[-1],
        }
        report["methods"][name] = row
        rates_told = (
            f"{row['tokens_per_second']:9.0f} tokens/s, {row['gflops']:7.0f} GFLOP/s, {row['share']:.2f} of the product"
        )
        print(f"{name:10s} {rates_told}, loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
