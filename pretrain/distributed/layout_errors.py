"""Which layouts and `deepspeed:` sections cannot run, and why: one wording of each rule, for `tiphys check` and for the engine.

Pure functions of plain values, without torch. Each yields (key path in the recipe, reason) for each rule that is broken.
A `deepspeed:` section may still hold `auto`, and values of a wrong type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

Error: TypeAlias = tuple[str, str]

OPTIMIZERS = ("Adam", "AdamW")
MOST_ROWS = 2**22  # of a global batch

# Switches of DeepSpeed with which a run would silently train something else than the recipe says, or crash in the first step.
_SWITCHES = {
    "amp": "would compute the router and the loss in half precision; use bf16",
    "torch_autocast": "would compute the router and the loss in half precision; use bf16",
    "expert_parallel": "the model divides its experts itself; set parallel.expert",
    "elasticity": "would change train_batch_size, and with it every loss; the same batch runs on any number of processes",
    "progressive_layer_drop": "the model does not drop layers",
    "curriculum_learning": "only the sampling plan decides what a step trains on",
    "data_efficiency": "only the sampling plan decides what a step trains on",
    "hybrid_engine": "it is made for text generation",
}
_ZERO = {
    "zenflow": "a checkpoint does not know where it keeps its state",
    "zero_quantized_weights": "the weights would differ from their fp32 masters, and a checkpoint refuses to save such weights",
    "zero_quantized_nontrainable_weights": "the weights would differ from what was frozen",
    "zero_quantized_gradients": "gradients would depend on the layout",
}
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def grid_errors(world: int, pipeline: int, expert: int) -> Iterator[Error]:
    """How `world` processes cannot be divided. 0 processes: their number is unknown, so only the sizes are checked."""
    sizes = {"pipeline": pipeline, "expert": expert}
    small = [
        (f"parallel.{name}", f"{size} is out of range; allowed: at least 1") for name, size in sizes.items() if size < 1
    ]
    if small:
        yield from small
    elif world % pipeline:
        yield (
            "parallel.pipeline",
            f"{world} processes cannot be divided into {pipeline} pipeline stages; start a multiple of {pipeline}",
        )
    elif world // pipeline % expert:
        yield (
            "parallel.expert",
            f"{world // pipeline} data-parallel processes ({world} processes ÷ {pipeline} stages) cannot be divided into expert "
            f"groups of {expert}",
        )


def stage_errors(pipeline: int, layers: int) -> Iterator[Error]:
    """Each pipeline stage needs a layer."""
    if pipeline > layers:
        yield (
            "parallel.pipeline",
            f"{layers} layers cannot make {pipeline} pipeline stages; raise model.layers or lower parallel.pipeline",
        )


def expert_errors(expert: int, experts: int) -> Iterator[Error]:
    """The processes of an expert group hold equally many experts, at least one."""
    if expert > 1 and (experts == 0 or experts % expert):
        yield (
            "parallel.expert",
            f"model.moe.experts ({experts}) must be a positive multiple of parallel.expert ({expert})",
        )


def zero_stage(config: Mapping[str, Any]) -> Any:
    """The ZeRO stage of a `deepspeed:` section; 0, DeepSpeed's default, if there is none."""
    stage = _section(config, "zero_optimization").get("stage", 0)
    return 0 if stage == "auto" else stage


def bf16_enabled(config: Mapping[str, Any]) -> bool:
    """Whether a `deepspeed:` section turns bf16 on. `auto` counts as on."""
    return bool((_section(config, "bf16") or _section(config, "bfloat16")).get("enabled"))


def zero_errors(config: Mapping[str, Any], pipeline: int, expert: int) -> Iterator[Error]:
    """Which ZeRO stages a layout cannot have. A wrong stage itself is an error of the section."""
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3):
        return
    norm = "computes a wrong gradient norm with stage 0"
    if pipeline > 1 and stage != 1:
        why = norm if stage == 0 else "cannot partition the gradients of a pipeline"
        yield (
            "parallel.pipeline",
            f"{pipeline} stages need deepspeed.zero_optimization.stage: 1, not {stage}: DeepSpeed {why}",
        )
    if expert > 1 and stage not in (1, 2):
        why = norm if stage == 0 else "refuses expert groups with stage 3"
        yield (
            "parallel.expert",
            f"{expert}-way expert parallelism needs deepspeed.zero_optimization.stage: 1 or 2, not {stage}: DeepSpeed {why}",
        )


def section_errors(config: Mapping[str, Any]) -> Iterator[Error]:
    """What a `deepspeed:` section cannot ask for on any layout."""
    for name, reason in _SWITCHES.items():
        if _section(config, name).get("enabled"):
            yield f"deepspeed.{name}", reason
    if _section(config, "tensor_parallel").get("autotp_size", 0) not in (0, 1):
        yield (
            "deepspeed.tensor_parallel.autotp_size",
            "the tensors of a layer are not divided; use ZeRO, parallel.pipeline or parallel.expert",
        )
    if config.get("use_data_before_expert_parallelism"):
        yield (
            "deepspeed.use_data_before_expert_parallelism",
            "the experts of a layer are divided among neighbouring processes",
        )
    if config.get("gradient_allreduce_op", "mean") != "mean":
        yield "deepspeed.gradient_allreduce_op", "the loss is scaled for a mean over the processes"
    if config.get("managed_gradient_accumulation", True) is not True:
        yield (
            "deepspeed.managed_gradient_accumulation",
            "the loss is scaled for DeepSpeed's division by the accumulation steps",
        )
    yield from _zero_section_errors(config)
    yield from _precision_errors(config)
    yield from _optimizer_errors(config)


def _zero_section_errors(config: Mapping[str, Any]) -> Iterator[Error]:
    zero, stage = _section(config, "zero_optimization"), zero_stage(config)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield "deepspeed.zero_optimization.stage", f"{stage!r} is not allowed; allowed: 0, 1, 2 or 3"
    for name, reason in _ZERO.items():
        if zero.get(name):
            yield f"deepspeed.zero_optimization.{name}", reason
    if zero.get("zero_hpz_partition_size", 1) != 1:
        yield (
            "deepspeed.zero_optimization.zero_hpz_partition_size",
            "a checkpoint does not know its second copy of the weights",
        )
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _section(zero, name).get("device", "none")
        if device not in ("none", "cpu"):
            yield (
                f"deepspeed.zero_optimization.{name}.device",
                f"{device!r}: a checkpoint reads state only from memory; write cpu",
            )
        elif device == "cpu" and isinstance(stage, int) and stage < least:
            yield (
                f"deepspeed.zero_optimization.{name}",
                f"DeepSpeed ignores it at stage {stage}; it needs stage {least} or more",
            )


def _precision_errors(config: Mapping[str, Any]) -> Iterator[Error]:
    if _section(config, "fp16").get("enabled", False) not in (None, False, "auto"):
        yield "deepspeed.fp16", "is not supported, because auxiliary gradients have no loss scale; use bf16"
    if bf16_enabled(config) and zero_stage(config) == 0:
        yield (
            "deepspeed.zero_optimization.stage",
            "bf16 with stage 0 keeps no fp32 master weights and loses precision (6e-2 in the loss); use stage 1, 2 or 3",
        )


def _optimizer_errors(config: Mapping[str, Any]) -> Iterator[Error]:
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, Mapping):
        yield "deepspeed.optimizer", "is missing; write for example {type: AdamW, params: {lr: 1e-4}}"
    elif optimizer.get("type") not in OPTIMIZERS:
        yield (
            "deepspeed.optimizer.type",
            f"{optimizer.get('type')!r} is not supported; use {' or '.join(OPTIMIZERS)}: a checkpoint holds their state only",
        )


def batch_errors(config: Mapping[str, Any], data: int = 0) -> Iterator[Error]:
    """What is wrong with the batch sizes on `data` data-parallel processes; 0: their number is unknown."""
    given = {key: config[key] for key in _BATCH if config.get(key) not in (None, "auto")}
    wrong = {key: value for key, value in given.items() if not _whole(value)}
    for key, value in wrong.items():
        yield f"deepspeed.{key}", f"{value!r} is not allowed; allowed: a whole number, at least 1, at most {MOST_ROWS}"
    if _BATCH[0] not in given:
        missing = "cannot be auto" if config.get(_BATCH[0]) == "auto" else "is missing"
        yield (
            f"deepspeed.{_BATCH[0]}",
            f"{missing}: it is the number of rows of a global batch, the same on every layout",
        )
    elif data and not wrong:
        rows, micro, accumulation = (given.get(key, 0) for key in _BATCH)
        yield from _arithmetic_errors(rows, micro, accumulation, data)


def _arithmetic_errors(rows: int, micro: int, accumulation: int, data: int) -> Iterator[Error]:
    most = math.ceil(rows / data)
    each = f"train_batch_size {rows} over {data} data-parallel processes is {most} rows for each"
    if not accumulation:
        return
    if not micro:
        if accumulation > most:
            yield (
                "deepspeed.gradient_accumulation_steps",
                f"{each}; {accumulation} micro-batches are more than the {most} rows",
            )
        return
    held = f"train_micro_batch_size_per_gpu {micro} × gradient_accumulation_steps {accumulation}"
    if micro * accumulation < most:
        yield "deepspeed.gradient_accumulation_steps", f"{each}, but {held} hold only {micro * accumulation}"
    elif micro * accumulation - most >= micro:
        yield (
            "deepspeed.gradient_accumulation_steps",
            f"{each}; of {held} at least one whole micro-batch would be empty. Remove gradient_accumulation_steps: it is derived",
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_ROWS
