"""Speed of the model's forward and backward pass, side by side in one run.

    python -m benchmarks.train --hidden 512 --tokens 4096 --json FILE

Three models of the same shape (every layer a mixture of experts, SwiGLU, top-k, no shared expert) train on the same tokens with
AdamW, from the same weights: ours; ours with `deepspeed.moe.layer.MoE` instead of our expert layer; Mixtral of `transformers`.
The models take turns in every round, so that other work on the machine slows all of them. Rates are medians of the forward and
backward pass, and of a whole step with AdamW. `share` is the useful operations per second of the passes, divided by the
machine's rate for one matrix product of the layer's shape (the best of those measured between the rounds). On a GPU with a known
peak, `mfu` is that of whole steps. The losses show that all three models learn equally well. Peak memory is measured in a
process of its own for each model and includes parameters, gradients and moments. The row of a model that does not fit the
device says so, and the others continue. If they do not fit together, give them one at a time with `--methods`.

On a CPU, processes keep freed memory, as training under the launcher does (`tiphys.launch.submit.KEEP_MEMORY`);
`--malloc default` measures without this.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiphys.launch.submit import KEEP_MEMORY
from tiphys.pretrain.distributed.deepspeed_config import cpu_has_bf16
from tiphys.pretrain.distributed.spans import peak_memory
from tiphys.pretrain.metrics import peak_rate
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.flops import flops_per_batch, parameters
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.moe import mixtures
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens.batch import TEXT, TokenBatch

VOCABULARY = 2048
LONG = 1e13  # operations that a GPU is timed with: about 15 ms of an H200


def make_batch(rows: int, context: int, seed: int) -> TokenBatch:
    """Each row is one full window. The next token is the previous one plus a small step, which can be learned."""
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
    """DeepSpeed's layer with the signature of ours. It drops no tokens, like ours."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        from tiphys.pretrain.model.layers import Mlp

        self.moe = MoE(
            config.hidden_size,
            Mlp(config, config.moe_intermediate_size),
            num_experts=config.num_experts,
            k=config.num_experts_per_tok,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: Tensor, layout: Any) -> Tensor:
        return self.moe(x)[0]

    @torch.no_grad()
    def take(self, ours: Any) -> None:
        """Copy the weights of our layer."""
        layer = self.moe.deepspeed_moe
        layer.gate.wg.weight.copy_(ours.router.weight)
        for i, expert in enumerate(layer.experts.deepspeed_experts):
            expert.up.weight.copy_(ours.experts.up[i].T)
            expert.down.weight.copy_(ours.experts.down[i].T)


def make_deepspeed(
    config: DecisionConfig, options: argparse.Namespace
) -> tuple[nn.Module, Callable[[TokenBatch], Tensor]]:
    import deepspeed
    import deepspeed.ops

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if options.device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if options.device == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    model = DecisionModel(config)
    for block in model.layers:
        ours, block.mlp = block.mlp, DeepSpeedMixture(config)
        block.mlp.moe.set_deepspeed_parallelism()
        block.mlp.take(ours)
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
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.theta},
        )
    )
    take(model, DecisionModel(config))
    model = model.to(options.device, options.dtype).train()

    def loss(batch: TokenBatch) -> Tensor:
        tokens, target = (torch.from_numpy(t).long().to(options.device) for t in (batch.tokens, batch.target))
        logits = model(input_ids=tokens, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    return model, loss


@torch.no_grad()
def take(mixtral: Any, ours: Any) -> None:
    """Copy the weights of a DecisionModel to Mixtral, which rotates the halves of a head, while we rotate neighbouring pairs."""
    config, size = ours.config, ours.config.head_size
    halves = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
    mixtral.model.embed_tokens.weight.copy_(ours.token.weight + ours.embedding.local.weight[0])
    for theirs, block in zip(mixtral.model.layers, ours.layers, strict=True):
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        q, k, v = block.attention.qkv.weight.split([n * size for n in heads])
        for name, part in (("q_proj", q), ("k_proj", k)):
            getattr(theirs.self_attn, name).weight.copy_(part.view(-1, size, part.shape[1])[:, halves].flatten(0, 1))
        theirs.self_attn.v_proj.weight.copy_(v)
        theirs.self_attn.o_proj.weight.copy_(block.attention.out.weight)
        theirs.mlp.gate.weight.copy_(block.mlp.router.weight)
        theirs.mlp.experts.gate_up_proj.copy_(block.mlp.experts.up.transpose(1, 2))
        theirs.mlp.experts.down_proj.copy_(block.mlp.experts.down.transpose(1, 2))
    mixtral.lm_head.weight.copy_(ours.output.weight)


MAKERS = {"ours": make_ours, "deepspeed": make_deepspeed, "mixtral": make_mixtral}


def matrix_rate(options: argparse.Namespace) -> float:
    """Operations per second of one matrix product of the layer's shape, forward only."""
    a = torch.randn(options.tokens, options.hidden, device=options.device, dtype=options.dtype)
    b = torch.randn(options.hidden, 4 * options.hidden, device=options.device, dtype=options.dtype)
    operations = 2 * a.shape[0] * b.numel()
    # On a GPU one product takes less time than its launch.
    times = 1 if options.device == "cpu" else max(1, int(LONG // operations))

    def work() -> None:
        for _ in range(times):
            a @ b

    seconds, _ = timed(work, options.device)
    return times * operations / seconds


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
    parser.add_argument(
        "--dtype", default="auto", help="auto: bfloat16 if the device multiplies it natively, otherwise float32"
    )
    parser.add_argument("--malloc", default="keep", choices=["keep", "default"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    if options.dtype == "auto":
        options.dtype = "bfloat16" if options.device != "cpu" or cpu_has_bf16() else "float32"
    options.dtype = getattr(torch, options.dtype)
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        if options.malloc == "keep" and not os.environ.keys() >= KEEP_MEMORY.keys():  # read only when a process starts
            os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEP_MEMORY})
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
    seconds: list[float] = field(default_factory=list)  # forward and backward pass
    steps: list[float] = field(default_factory=list)  # whole steps
    losses: list[float] = field(default_factory=list)

    def step(self, batch: TokenBatch, device: str, warm: bool) -> bool:
        """Do one optimizer step; time it if `warm`. Returns True, so that `fitting` can tell it from a failure."""

        def work() -> Tensor:
            value = self.loss(batch)
            value.backward()
            return value.detach()

        def update() -> None:
            for mixture in mixtures(self.model):
                if mixture.counts is not None:
                    mixture.finish_step(mixture.counts)
            self.optimizer.step()
            self.optimizer.zero_grad()

        seconds, value = timed(work, device)
        more, _ = timed(update, device)
        self.losses.append(float(value))
        if warm:
            self.seconds.append(seconds)
            self.steps.append(seconds + more)
        return True


def memory_of(method: str) -> float:
    """Peak memory in MiB of a process that runs one method for two steps."""
    command = [*sys.orig_argv, "--methods", method, "--rounds", "1", "--json", "/dev/stdout"]
    output = subprocess.run([sys.executable, *command[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output[output.index("{\n") :])["peak_mib"]


def make_method(name: str, config: DecisionConfig, options: argparse.Namespace) -> Method:
    model, loss = MAKERS[name](config, options)
    fused = options.device != "cpu"
    return Method(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused))


def measure(config: DecisionConfig, options: argparse.Namespace) -> tuple[dict[str, Method | None], float]:
    """All methods after their rounds, without models (None if a method did not fit the device), and the rate of one product."""
    methods: dict[str, Method | None] = {}
    rates = []
    for name in options.methods:
        methods[name] = fitting(functools.partial(make_method, name, config, options))
    for step in range(options.rounds + 1):
        batch = make_batch(options.tokens // options.context, options.context, step)
        for name, method in methods.items():
            if method is not None and not fitting(functools.partial(method.step, batch, options.device, step > 0)):
                del method
                methods[name] = None
                release()
        rates.append(matrix_rate(options))
    for method in methods.values():
        if method is not None:
            del method.model, method.loss, method.optimizer
    release()
    return methods, max(rates)


def fitting(work: Callable[[], Any]) -> Any:
    """The result of `work`; None if the device has too little memory."""
    try:
        return work()
    except torch.OutOfMemoryError:
        release()
        return None


def release() -> None:
    """Release unused memory, so that other processes can use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    options = parse()
    config, device = make_config(options), torch.device(options.device)
    methods, rate = measure(config, options)
    flops = flops_per_batch(config, make_batch(options.tokens // options.context, options.context, 0))
    everything, active = parameters(config)
    report: dict[str, Any] = {
        "shape": {k: str(v) for k, v in vars(options).items() if k not in ("json", "methods")},
        "threads": torch.get_num_threads(),
        "parameters": everything,
        "active_parameters": active,
        "matrix_gflops": rate / 1e9,
        "peak_mib": peak_memory(device) / 2**20,
        "methods": {},
    }
    print(
        f"{options.tokens} tokens per step, hidden {options.hidden}, {options.experts} experts, k = {options.k}, "
        f"{options.dtype}, {torch.get_num_threads()} threads, malloc: {options.malloc}, "
        f"{everything / 1e6:.0f}M parameters, {active / 1e6:.0f}M active"
    )
    print(f"one matrix product: {rate / 1e9:.0f} GFLOP/s")
    alone = len(methods) == 1
    for name, method in methods.items():
        if method is None:
            report["methods"][name] = {"out_of_memory": True}
            print(f"{name:10s} does not fit the device" + ("" if alone else " together with the others"))
            continue
        seconds, step = statistics.median(method.seconds), statistics.median(method.steps)
        row = {
            "tokens_per_second": options.tokens / seconds,
            "gflops": flops / seconds / 1e9,
            "share": flops / seconds / rate,
            "step_tokens_per_second": options.tokens / step,
            "step_gflops": flops / step / 1e9,
            "first_loss": method.losses[0],
            "last_loss": method.losses[-1],
            "peak_mib": report["peak_mib"] if alone else memory_of(name),
        }
        if device.type == "cuda":
            row["mfu"] = flops / step / peak_rate(device, options.dtype)
        report["methods"][name] = row
        rates = (
            f"{row['tokens_per_second']:9.0f} tokens/s, {row['gflops']:7.0f} GFLOP/s, {row['share']:.2f} of the product; "
            f"whole steps {row['step_tokens_per_second']:.0f} tokens/s"
            + (f", MFU {row['mfu']:.2f}" if "mfu" in row else "")
        )
        rest = f"{row['peak_mib']:6.0f} MiB, loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}"
        print(f"{name:10s} {rates}, {rest}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
