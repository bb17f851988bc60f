"""From a recipe's `deepspeed:` section and a layout to DeepSpeed's configuration, with a record of every change.

The section is passed on unchanged, with these exceptions: the batch sizes (rows that do not divide evenly are filled up),
values written `auto`, and flags that this device needs. `Derived.values` lists every change. This file imports no torch,
because the recipe check calls it too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiphys.pretrain.parallel import Grid, LayoutError

if TYPE_CHECKING:
    from tiphys.recipes.schema import Recipe

OPTIMIZERS = ("Adam", "AdamW")  # their state is exp_avg, exp_avg_sq and step: what a checkpoint can hold


@dataclass(frozen=True)
class Derived:
    """DeepSpeed's `config`, the changes (`values`: key path -> derived value), and the sizes of one rank's part of a step."""

    config: dict[str, Any]
    values: dict[str, Any]
    rows: int  # B: real rows of the global batch
    rows_per_rank: int  # after filling up: micro_batch × accumulation
    micro_batch: int
    accumulation: int
    stage: int  # ZeRO
    bf16: bool


@dataclass
class _Changes:
    config: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)

    def set(self, path: str, value: Any, why: str = "") -> None:
        node = self.config
        *parents, key = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
        self.values[path] = f"{value} ({why})" if why else value


def derive(recipe: Recipe, grid: Grid, *, accelerator: str = "cpu") -> Derived:
    """Raises LayoutError if DeepSpeed cannot run the section on this layout, or would give wrong results."""
    changes = _Changes(copy.deepcopy(dict(recipe.deepspeed)))
    _precision(changes, accelerator)
    _automatic(changes, recipe)
    stage, bf16 = _refuse(changes.config, grid)
    rows, micro, accumulation = _sizes(changes.config, grid)
    rows_per_rank = micro * accumulation
    filled = rows_per_rank * grid.data
    why = f"{rows} real rows and {filled - rows} empty ones over {grid.data} ranks" if filled != rows else ""
    for key, value in (
        ("train_batch_size", filled),
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if changes.config.get(key) != value:
            changes.set(key, value, why if key == "train_batch_size" else "")
    if "gradient_clipping" not in changes.config:
        changes.set("gradient_clipping", 1.0, "DeepSpeed's default; 0 turns clipping off")
    if accelerator != "cpu" and stage in (1, 2) and recipe.model.moe.experts and _aligns_parameters():
        changes.set(
            "zero_optimization.parameter_alignment",
            True,
            "grouped products would copy weights that are not aligned",
        )
    if accelerator == "cpu" and not changes.config["optimizer"].get("params", {}).get("torch_adam"):
        changes.set("optimizer.params.torch_adam", True, "on a CPU the fused optimizer would have to be compiled first")
    return Derived(changes.config, changes.values, rows, rows_per_rank, micro, accumulation, stage, bf16)


def _aligns_parameters() -> bool:
    """Whether this DeepSpeed can align parameters to 16 bytes."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return "parameter_alignment" in DeepSpeedZeroConfig.model_fields


def _precision(changes: _Changes, accelerator: str) -> None:
    """`bf16: {enabled: auto}`: bf16 if the device multiplies it natively; emulated bf16 would be five times slower than fp32."""
    if (changes.config.get("bf16") or {}).get("enabled") == "auto":
        native = accelerator != "cpu" or cpu_has_bf16()
        why = "this CPU multiplies bf16 natively" if native else "this CPU has no bf16 products"
        changes.set("bf16.enabled", native, why if accelerator == "cpu" else "auto")


def cpu_has_bf16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether all listed processors have bf16 matrix or dot products (x86: AVX512-BF16 or AMX; Arm: bf16)."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as lines:
            flags = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    except OSError:
        return False
    return bool(flags) and all(f & {"avx512_bf16", "amx_bf16", "bf16"} for f in flags)


def _automatic(changes: _Changes, recipe: Recipe) -> None:
    """Replace `auto` by what another key of the recipe says; without one, leave the value to DeepSpeed's default."""
    optimizer = changes.config.get("optimizer") or {}
    known = {
        "scheduler.params.total_num_steps": recipe.train.steps,
        "scheduler.params.warmup_max_lr": (optimizer.get("params") or {}).get("lr"),
    }

    def walk(node: dict[str, Any], path: str) -> None:
        for key in list(node):
            at = f"{path}{key}"
            if isinstance(node[key], dict):
                walk(node[key], f"{at}.")
            elif node[key] == "auto":
                if known.get(at) is not None:
                    changes.set(at, known[at], "auto")
                else:
                    del node[key]
                    changes.values[at] = "DeepSpeed's default (auto)"

    walk(changes.config, "")


# Switches of DeepSpeed that would train something else than the recipe says, silently or by a crash in the first step.
_SECTIONS = {
    "amp": "would compute the router and the loss in half precision; use bf16",
    "torch_autocast": "would compute the router and the loss in half precision; use bf16",
    "expert_parallel": "the model divides its experts itself: write parallel.expert",
    "elasticity": "would change train_batch_size, and with it every loss; the same batch runs on any number of processes",
    "progressive_layer_drop": "the model does not drop layers",
    "curriculum_learning": "the sampling plan alone says what a step trains on",
    "data_efficiency": "the sampling plan alone says what a step trains on",
    "hybrid_engine": "it is made for text generation",
}
_ZERO = {
    "zenflow": "a checkpoint does not know where it keeps its state",
    "zero_quantized_weights": "the weights would differ from their fp32 masters, which a checkpoint refuses to save",
    "zero_quantized_nontrainable_weights": "the weights would differ from what was frozen",
    "zero_quantized_gradients": "gradients would depend on the layout",
}


def unsupported(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key path, reason) of everything in a `deepspeed:` section that cannot be had, whatever the layout."""

    def section(name: str, of: Mapping[str, Any] = config) -> Mapping[str, Any]:
        value = of.get(name)
        return value if isinstance(value, Mapping) else {}

    for name, reason in _SECTIONS.items():
        if section(name).get("enabled"):
            yield name, reason
    if section("tensor_parallel").get("autotp_size", 0) not in (0, 1):
        yield (
            "tensor_parallel.autotp_size",
            "layers are not cut into tensors' parts; use ZeRO, parallel.pipeline or .expert",
        )
    if config.get("use_data_before_expert_parallelism"):
        yield "use_data_before_expert_parallelism", "neighbouring processes hold the experts of a layer between them"
    if config.get("gradient_allreduce_op", "mean") != "mean":
        yield "gradient_allreduce_op", "the loss is scaled for a mean over the processes"
    if config.get("managed_gradient_accumulation", True) is not True:
        yield "managed_gradient_accumulation", "the loss is scaled for DeepSpeed's division by the accumulation steps"
    zero = section("zero_optimization")
    stage = zero.get("stage", 0)
    for name, reason in _ZERO.items():
        if zero.get(name):
            yield f"zero_optimization.{name}", reason
    if zero.get("zero_hpz_partition_size", 1) != 1:
        yield "zero_optimization.zero_hpz_partition_size", "a checkpoint does not know its second copy of the weights"
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = section(name, zero).get("device", "none")
        if device not in ("none", "cpu"):
            yield (
                f"zero_optimization.{name}.device",
                f"{device!r}: a checkpoint reads state from memory only; write cpu",
            )
        elif device == "cpu" and isinstance(stage, int) and stage < least:
            yield f"zero_optimization.{name}", f"DeepSpeed ignores it at stage {stage}; it needs stage {least} or more"


def _refuse(config: Mapping[str, Any], grid: Grid) -> tuple[int, bool]:
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    bf16 = bool((config.get("bf16") or config.get("bfloat16") or {}).get("enabled", False))
    if stage not in (0, 1, 2, 3):
        raise LayoutError(f"deepspeed.zero_optimization.stage is {stage}; it must be 0, 1, 2 or 3")
    refused = [f"deepspeed.{key}: {reason}" for key, reason in unsupported(config)]
    if refused:
        raise LayoutError("\n".join(refused))
    if (config.get("fp16") or {}).get("enabled", False):
        raise LayoutError("deepspeed.fp16: not supported, because auxiliary gradients carry no loss scale; use bf16")
    if stage == 0 and bf16:
        raise LayoutError(
            "deepspeed.zero_optimization.stage 0 with bf16 keeps no fp32 master weights and drifts; use stage 1, 2 or 3"
        )
    if grid.pipeline > 1 and stage != 1:
        why = (
            "computes a wrong gradient norm without ZeRO" if stage == 0 else "cannot partition gradients of a pipeline"
        )
        raise LayoutError(
            f"parallel.pipeline {grid.pipeline} needs deepspeed.zero_optimization.stage 1, not {stage}: DeepSpeed {why}"
        )
    if grid.expert > 1 and stage not in (1, 2):
        why = "computes a wrong gradient norm without ZeRO" if stage == 0 else "refuses expert groups under stage 3"
        raise LayoutError(
            f"parallel.expert {grid.expert} needs deepspeed.zero_optimization.stage 1 or 2, not {stage}: DeepSpeed {why}"
        )
    kind = (config.get("optimizer") or {}).get("type")
    if kind not in OPTIMIZERS:
        raise LayoutError(f"deepspeed.optimizer.type is {kind!r}; supported are {' and '.join(OPTIMIZERS)}")
    return stage, bf16


def _sizes(config: Mapping[str, Any], grid: Grid) -> tuple[int, int, int]:
    """(rows B, micro-batch, accumulation): every rank computes ⌈B / ranks⌉ rows, filled up to micro-batch × accumulation."""

    def size(key: str) -> int:
        value = config.get(key)
        if value is None:
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LayoutError(f"deepspeed.{key} is {value!r}; it must be a whole number of at least 1")
        return value

    rows = size("train_batch_size")
    micro, accumulation = size("train_micro_batch_size_per_gpu"), size("gradient_accumulation_steps")
    if not rows:
        raise LayoutError(
            "deepspeed.train_batch_size is missing: it is the number of rows of a global batch, the same on every layout"
        )
    mine = math.ceil(rows / grid.data)
    if micro and accumulation:
        capacity = micro * accumulation
        if capacity < mine:
            raise LayoutError(
                f"deepspeed: train_batch_size {rows} over {grid.data} ranks is {mine} rows a rank, but "
                f"train_micro_batch_size_per_gpu {micro} × gradient_accumulation_steps {accumulation} hold only {capacity}"
            )
        if capacity - mine >= micro:
            raise LayoutError(
                f"deepspeed: train_batch_size {rows} over {grid.data} ranks is {mine} rows a rank; of "
                f"gradient_accumulation_steps {accumulation} × train_micro_batch_size_per_gpu {micro} at least one whole "
                f"micro-batch would be empty. Remove gradient_accumulation_steps: it is derived"
            )
        return rows, micro, accumulation
    if micro:
        micro = min(micro, mine)
        return rows, micro, math.ceil(mine / micro)
    accumulation = accumulation or 1
    if accumulation > mine:
        raise LayoutError(
            f"deepspeed.gradient_accumulation_steps {accumulation} is more than the {mine} rows of a rank "
            f"(train_batch_size {rows} over {grid.data} ranks)"
        )
    return rows, math.ceil(mine / accumulation), accumulation
