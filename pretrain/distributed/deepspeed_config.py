"""From a recipe's `deepspeed:` section and a layout to the configuration that DeepSpeed gets.

The section is passed on as it is, with three kinds of changes: batch sizes (if the rows do not divide evenly, empty rows are
added), values written `auto`, and flags without which the section cannot run on this device. `Derived.values` lists the changes.
This file imports no torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiphys.pretrain.distributed.layout_errors import (
    batch_errors,
    bf16_enabled,
    section_errors,
    zero_errors,
    zero_stage,
)
from tiphys.pretrain.parallel import Grid, refuse

if TYPE_CHECKING:
    from tiphys.recipes.schema import Recipe


@dataclass(frozen=True)
class Derived:
    """DeepSpeed's configuration, and the sizes of one rank's part of a step.

    values  key path in `deepspeed:` -> the value that was derived for it
    """

    config: dict[str, Any]
    values: dict[str, Any]
    rows: int  # B: real rows of a global batch
    rows_per_rank: int  # micro_batch × accumulation, with empty rows
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


MOST_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once by default


def derive(recipe: Recipe, grid: Grid, *, accelerator: str = "cpu", elements: int = 0) -> Derived:
    """DeepSpeed's configuration for this layout.

    elements  trained parameters of this rank's part of the model, before ZeRO divides them; 0: not known

    Raises LayoutError, with all reasons, if DeepSpeed cannot run the section on this layout or would run it wrongly.
    """
    changes = _Changes(copy.deepcopy(dict(recipe.deepspeed)))
    _precision(changes, accelerator)
    _automatic(changes, recipe)
    _refuse(changes.config, grid)
    stage, bf16 = int(zero_stage(changes.config)), bf16_enabled(changes.config)
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
    if elements and stage and "reduce_bucket_size" not in changes.config.get("zero_optimization", {}):
        changes.set("zero_optimization.reduce_bucket_size", min(MOST_BUCKET, elements), "elements")
    if accelerator == "cpu" and not changes.config["optimizer"].get("params", {}).get("torch_adam"):
        changes.set("optimizer.params.torch_adam", True, "on a CPU the fused optimizer would have to be compiled first")
    return Derived(changes.config, changes.values, rows, rows_per_rank, micro, accumulation, stage, bf16)


def _aligns_parameters() -> bool:
    """Whether this DeepSpeed can align parameters to 16 bytes."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return "parameter_alignment" in DeepSpeedZeroConfig.model_fields


def _precision(changes: _Changes, accelerator: str) -> None:
    """`bf16: {enabled: auto}` is bf16 if the device multiplies it natively; emulated bf16 would be five times slower."""
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
    """Replace `auto` by what the recipe says elsewhere, or else leave the value to DeepSpeed's default."""
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


def _refuse(config: Mapping[str, Any], grid: Grid) -> None:
    layout = zero_errors(config, grid.pipeline, grid.expert)
    refuse([*section_errors(config), *layout, *batch_errors(config, grid.data)])


def _sizes(config: Mapping[str, Any], grid: Grid) -> tuple[int, int, int]:
    """(rows B, micro-batch, accumulation). Every rank computes ⌈B / ranks⌉ rows; empty ones complete its micro-batches."""
    rows: int = config["train_batch_size"]
    micro: int = config.get("train_micro_batch_size_per_gpu") or 0
    accumulation: int = config.get("gradient_accumulation_steps") or 0
    most = math.ceil(rows / grid.data)
    if micro and accumulation:
        return rows, micro, accumulation
    if micro:
        micro = min(micro, most)
        return rows, micro, math.ceil(most / micro)
    accumulation = accumulation or 1
    return rows, math.ceil(most / accumulation), accumulation
