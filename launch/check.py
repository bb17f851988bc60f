"""Every error of a recipe at once: its schema, DeepSpeed's keys, objectives, layout, batch arithmetic, data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tiphys.launch.submit import devices
from tiphys.pretrain.distributed.deepspeed_config import unsupported
from tiphys.recipes.load import Examined, RecipeError, examine, from_dict
from tiphys.recipes.schema import Model, Parallel, Recipe

# Top-level keys of DeepSpeed 0.19's JSON. Its nested sections reject unknown keys themselves; the top level does not.
DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type compile
    compression_training csv_monitor comet curriculum_learning data_efficiency data_types dataloader_drop_last
    disable_allgather disable_python_gc dump_state elasticity eigenvalue expert_parallel flops_profiler fp16 fp32_allreduce
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown monitor_config optimizer pipeline prescale_gradients
    progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type sparse_attention
    sparse_gradients steps_per_print tensor_parallel tensorboard torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)
OPTIMIZERS = ("Adam", "AdamW")
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

Where = Callable[[str], str]


def check(path: str | Path, overrides: Iterable[str] = (), *, world: int = 0, data: bool = True) -> Recipe:
    """The recipe, or a RecipeError with everything that is wrong with it.

    world   number of processes it is meant for; 0: unknown, so that only sizes that no number of processes can mend count
    data    also open the datasets and lay the objectives over their tasks
    """
    seen = examine(path, overrides)
    errors = list(seen.errors)
    errors += _deepspeed(seen)
    errors += _layout(seen, world)
    errors += _model(seen)
    errors += _objectives(seen)
    if errors:
        raise RecipeError(errors)
    recipe = from_dict(seen.raw, str(seen.file))
    if data:
        errors += _data(recipe, seen)
        if errors:
            raise RecipeError(errors)
    return recipe


def _section(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _deepspeed(seen: Examined) -> Iterator[str]:
    config, where = _section(seen.raw, "deepspeed"), seen.where
    for key in config:
        if key not in DEEPSPEED_KEYS:
            near = difflib.get_close_matches(str(key), DEEPSPEED_KEYS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " See DeepSpeed's configuration page."
            yield f"{where(f'deepspeed.{key}')}: DeepSpeed has no such key.{hint}"
    yield from _batch_sizes(config, where)
    yield from _optimizer(config, where)
    for key, reason in unsupported(config):
        yield f"{where(f'deepspeed.{key}')}: {reason}"
    zero = config.get("zero_optimization", {})
    if isinstance(zero, dict):
        yield from _pydantic("zero_optimization", zero, where)
    bf16, fp16 = (isinstance(c := config.get(k), dict) and c.get("enabled") for k in ("bf16", "fp16"))
    if bf16 and fp16:
        yield f"{where('deepspeed.fp16')}: bf16 and fp16 are both enabled; keep one"
    for name in ("bf16", "fp16"):
        if isinstance(config.get(name), dict):
            yield from _pydantic(name, config[name], where)
    if bf16 and isinstance(zero, dict) and zero.get("stage", 0) == 0:
        yield (
            f"{where('deepspeed.zero_optimization')}: bf16 with ZeRO stage 0 loses precision in DeepSpeed (6e-2 in the loss);"
            " set zero_optimization.stage to 1, 2 or 3"
        )


def _batch_sizes(config: dict[str, Any], where: Where) -> Iterator[str]:
    if "train_batch_size" not in config:
        yield f"{where('deepspeed')}.train_batch_size is missing: the number of rows of the global batch"
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in config and not _whole(config[key]) and config[key] != "auto":
            yield f"{where(f'deepspeed.{key}')}: a whole number of at least 1 is wanted, not {config[key]!r}"


def _optimizer(config: dict[str, Any], where: Where) -> Iterator[str]:
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict):
        yield f"{where('deepspeed')}.optimizer is missing: {{type: AdamW, params: {{lr: 1e-4}}}}"
    elif optimizer.get("type") not in OPTIMIZERS:
        yield (
            f"{where('deepspeed.optimizer.type')}: {optimizer.get('type')!r} is not supported; allowed: "
            f"{', '.join(OPTIMIZERS)}"
        )
    for key in set(optimizer or ()) - {"type", "params", "legacy_fusion"} if isinstance(optimizer, dict) else ():
        yield f"{where(f'deepspeed.optimizer.{key}')}: unknown key; allowed: type, params"
    scheduler = config.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.get("type") not in SCHEDULERS:
        near = difflib.get_close_matches(str(scheduler.get("type")), SCHEDULERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield (
            f"{where('deepspeed.scheduler.type')}: {scheduler.get('type')!r} is none of DeepSpeed's schedules "
            f"({', '.join(SCHEDULERS)}).{hint}"
        )


def _pydantic(section: str, values: dict[str, Any], where: Where) -> Iterator[str]:
    """What DeepSpeed's own model of a section finds wrong."""
    from pydantic import ValidationError

    if not devices():  # else DeepSpeed warns that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if section == "zero_optimization":
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as model
    elif section == "bf16":
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config as model
    else:
        from deepspeed.runtime.precision_config import DeepSpeedFP16Config as model
    auto = {k: v for k, v in values.items() if v != "auto"}
    try:
        model(**auto)
    except ValidationError as error:
        for one in error.errors():
            key = ".".join(str(x) for x in one["loc"])
            near = difflib.get_close_matches(key, model.model_fields, n=1)
            hint = f". Did you mean {near[0]!r}?" if near and one["type"] == "extra_forbidden" else ""
            text = "DeepSpeed has no such key" if one["type"] == "extra_forbidden" else one["msg"]
            yield f"{where(f'deepspeed.{section}.{key}')}: {text}{hint}"


def _layout(seen: Examined, world: int) -> Iterator[str]:
    parallel, where = _section(seen.raw, "parallel"), seen.where
    pipeline, expert = (parallel.get(k, getattr(Parallel, k)) for k in ("pipeline", "expert"))
    if not _whole(pipeline) or not _whole(expert):
        for key, value in (("pipeline", pipeline), ("expert", expert)):
            if isinstance(value, int) and value < 1:
                yield f"{where(f'parallel.{key}')}: a whole number of at least 1 is wanted, not {value!r}"
        return
    zero = _section(_section(seen.raw, "deepspeed"), "zero_optimization")
    stage = zero.get("stage", 0)
    if pipeline > 1 and stage != 1:
        yield (
            f"{where('parallel.pipeline')}: {pipeline} stages need deepspeed.zero_optimization.stage: 1, not {stage}: DeepSpeed "
            "refuses stages 2 and 3 with a pipeline, and computes a wrong gradient norm with stage 0"
        )
    if expert > 1 and stage not in (1, 2):
        yield (
            f"{where('parallel.expert')}: {expert}-way expert parallelism needs deepspeed.zero_optimization.stage: 1 or 2, not "
            f"{stage}: DeepSpeed refuses stage 3 with expert groups, and computes a wrong gradient norm with stage 0"
        )
    experts = _section(_section(seen.raw, "model"), "moe").get("experts", 0)
    if expert > 1 and isinstance(experts, int) and (experts == 0 or experts % expert):
        yield f"{where('parallel.expert')}: model.moe.experts ({experts}) must be a multiple of {expert}"
    layers = _section(seen.raw, "model").get("layers", Model.layers)
    if isinstance(layers, int) and pipeline > layers:
        yield f"{where('parallel.pipeline')}: {pipeline} stages cannot share {layers} layers (model.layers)"
    if world and world % pipeline:
        yield f"{where('parallel.pipeline')}: {world} processes cannot be cut into {pipeline} stages"
    elif world and (world // pipeline) % expert:
        yield (
            f"{where('parallel.expert')}: the {world // pipeline} data-parallel processes cannot be cut into expert groups "
            f"of {expert}"
        )
    elif world:
        yield from _accumulation(seen, world // pipeline)


def _accumulation(seen: Examined, data: int) -> Iterator[str]:
    config, where = _section(seen.raw, "deepspeed"), seen.where
    rows, micro, steps = (
        config.get(k) for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if not (_whole(rows) and _whole(micro) and _whole(steps)):
        return
    assert isinstance(rows, int)
    assert isinstance(micro, int)
    assert isinstance(steps, int)
    if micro * steps * data < rows or (micro * steps - micro) * data >= rows:
        yield (
            f"{where('deepspeed.gradient_accumulation_steps')}: {micro} rows × {steps} micro-batches × {data} data-parallel "
            f"processes do not hold train_batch_size = {rows} rows exactly once; leave gradient_accumulation_steps out"
        )


def _model(seen: Examined) -> Iterator[str]:
    model, where = _section(seen.raw, "model"), seen.where
    sizes = {k: model.get(k, getattr(Model, k)) for k in ("layers", "hidden", "heads", "kv_heads", "ffn")}
    if any(not isinstance(v, int) for v in sizes.values()):
        return  # the schema has said so
    for key in ("layers", "hidden", "heads"):
        if sizes[key] < 1:
            yield f"{where(f'model.{key}')}: at least 1 is wanted, not {sizes[key]}"
            return
    if sizes["hidden"] % sizes["heads"]:
        yield f"{where('model.heads')}: {sizes['heads']} does not divide model.hidden = {sizes['hidden']}"
    elif (sizes["hidden"] // sizes["heads"]) % 2:
        yield f"{where('model.heads')}: model.hidden ÷ model.heads must be even (rotary positions)"
    if sizes["kv_heads"] and sizes["heads"] % sizes["kv_heads"]:
        yield f"{where('model.kv_heads')}: {sizes['kv_heads']} does not divide model.heads = {sizes['heads']}"
    moe = _section(model, "moe")
    experts, chosen, every = moe.get("experts", 0), moe.get("experts_per_token", 2), moe.get("every", 2)
    if isinstance(experts, int) and experts and isinstance(chosen, int) and not 1 <= chosen <= experts:
        yield f"{where('model.moe.experts_per_token')}: between 1 and model.moe.experts = {experts} is wanted, not {chosen}"
    if isinstance(every, int) and experts and not 1 <= every <= sizes["layers"]:
        yield f"{where('model.moe.every')}: between 1 and model.layers = {sizes['layers']} is wanted, not {every}"


def _objectives(seen: Examined) -> Iterator[str]:
    from tiphys.pretrain.tokens.paradigms import PARADIGMS

    named, where = _section(seen.raw, "objectives"), seen.where
    for name, options in named.items():
        paradigm = (options.get("paradigm") if isinstance(options, dict) else None) or name
        if paradigm not in PARADIGMS:
            near = difflib.get_close_matches(str(paradigm), PARADIGMS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(PARADIGMS)}."
            yield f"{where(f'objectives.{name}')}: no paradigm is called {paradigm!r}. {hint}"
    mixture = _section(seen.raw, "data").get("mixture")
    if not mixture:
        yield f"{where('data')}: data.mixture is empty: at least one {{dataset: …}} is wanted"
    for i, entry in enumerate(mixture if isinstance(mixture, list) else ()):
        wanted = entry.get("objective", "gato") if isinstance(entry, dict) else "gato"
        if wanted not in named and wanted not in PARADIGMS:
            near = difflib.get_close_matches(str(wanted), [*named, *PARADIGMS], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join([*named, *PARADIGMS])}."
            yield f"{where(f'data.mixture[{i}].objective')}: no objective is called {wanted!r}. {hint}"
        if isinstance(entry, dict) and isinstance(entry.get("weight"), int | float) and entry["weight"] < 0:
            yield f"{where(f'data.mixture[{i}].weight')}: a weight is not negative: {entry['weight']}"


def _data(recipe: Recipe, seen: Examined) -> Iterator[str]:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.pretrain.objectives import Objectives

    indexes = []
    for i, entry in enumerate(recipe.data.mixture):
        try:
            indexes.append(EpisodeIndex.open(entry.dataset))
        except (ValueError, OSError) as error:
            yield f"{seen.where(f'data.mixture[{i}].dataset')}: {error}"
    if len(indexes) < len(recipe.data.mixture):
        return
    try:
        Objectives(recipe, indexes)
    except ValueError as error:
        yield f"{seen.where('objectives')}: {error}"
