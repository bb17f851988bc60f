"""All errors of a recipe at once: schema, DeepSpeed's keys, objectives, layout, batch arithmetic, data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tiphys.launch.submit import devices
from tiphys.pretrain.distributed.layout_errors import (
    batch_errors,
    expert_errors,
    grid_errors,
    section_errors,
    stage_errors,
    zero_errors,
)
from tiphys.pretrain.model.size_errors import size_errors
from tiphys.recipes.keys import key_of, section_fields
from tiphys.recipes.load import Examined, RecipeError, examine, from_dict
from tiphys.recipes.schema import Experts, Model, Parallel, Recipe

# Top-level keys of DeepSpeed 0.19's JSON. DeepSpeed rejects unknown keys in its sections, but not at the top level.
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
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

Where = Callable[[str], str]


def check(path: str | Path, overrides: Iterable[str] = (), *, world: int = 0, data: bool = True) -> Recipe:
    """The recipe, if nothing is wrong with it. Raises RecipeError with everything that is wrong.

    world   number of processes it is meant for; 0: unknown, so that only what fails on every number of processes is an error
    data    also open the datasets and apply the objectives to their tasks
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


def _section(raw: dict[str, Any], *path: str) -> dict[str, Any]:
    for key in path:
        value = raw.get(key)
        raw = value if isinstance(value, dict) else {}
    return raw


def _values(section: type, given: dict[str, Any], *keys: str) -> dict[str, int] | None:
    """The given values or defaults of these keys; None if the schema check has refused one of them."""
    values = {key: given.get(key, getattr(section, key)) for key in keys}
    known = section_fields(section)
    wrong = (
        not isinstance(v, int) or isinstance(v, bool) or key_of(known[key][1]).problem(v) for key, v in values.items()
    )
    return None if any(wrong) else values


def _located(found: Iterable[tuple[str, str]], where: Where) -> Iterator[str]:
    for key, reason in found:
        yield f"{where(key)}: {reason}"


def _deepspeed(seen: Examined) -> Iterator[str]:
    config, where = _section(seen.raw, "deepspeed"), seen.where
    for key in config:
        if key not in DEEPSPEED_KEYS:
            near = difflib.get_close_matches(str(key), DEEPSPEED_KEYS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " See DeepSpeed's configuration page."
            yield f"{where(f'deepspeed.{key}')}: DeepSpeed has no such key.{hint}"
    found = [*section_errors(config), *_optimizer(config)]
    known = {key for key, _ in found}
    for name in ("zero_optimization", "bf16", "fp16"):
        values = _section(config, name)
        found += [(key, reason) for key, reason in _pydantic(name, values) if key not in known]
    yield from _located(found, where)


def _optimizer(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in sorted(set(_section(config, "optimizer")) - {"type", "params", "legacy_fusion"}):
        yield f"deepspeed.optimizer.{key}", "unknown key; allowed: type, params"
    scheduler = config.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.get("type") not in SCHEDULERS:
        near = difflib.get_close_matches(str(scheduler.get("type")), SCHEDULERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield (
            "deepspeed.scheduler.type",
            f"DeepSpeed has no schedule {scheduler.get('type')!r}; allowed: {', '.join(SCHEDULERS)}.{hint}",
        )


def _pydantic(section: str, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What DeepSpeed's own model of a section finds wrong."""
    from pydantic import ValidationError

    if not devices():  # otherwise DeepSpeed warns that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if section == "zero_optimization":
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as model
    elif section == "bf16":
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config as model
    else:
        from deepspeed.runtime.precision_config import DeepSpeedFP16Config as model
    try:
        model(**{k: v for k, v in values.items() if v != "auto"})
    except ValidationError as error:
        for one in error.errors():
            key = ".".join(str(x) for x in one["loc"])
            near = difflib.get_close_matches(key, model.model_fields, n=1)
            hint = f". Did you mean {near[0]!r}?" if near and one["type"] == "extra_forbidden" else ""
            text = "DeepSpeed has no such key" if one["type"] == "extra_forbidden" else one["msg"]
            yield f"deepspeed.{section}.{key}", f"{text}{hint}"


def _layout(seen: Examined, world: int) -> Iterator[str]:
    config, found = _section(seen.raw, "deepspeed"), list[tuple[str, str]]()
    data = 0  # data-parallel processes; 0: unknown
    parallel = _values(Parallel, _section(seen.raw, "parallel"), "pipeline", "expert")
    if parallel is not None:
        pipeline, expert = parallel["pipeline"], parallel["expert"]
        found += zero_errors(config, pipeline, expert)
        if model := _values(Model, _section(seen.raw, "model"), "layers"):
            found += stage_errors(pipeline, model["layers"])
        if experts := _values(Experts, _section(seen.raw, "model", "moe"), "experts"):
            found += expert_errors(expert, experts["experts"])
        grid = list(grid_errors(world, pipeline, expert))
        found += grid
        data = 0 if grid else world // pipeline
    yield from _located([*batch_errors(config, data), *found], seen.where)


def _model(seen: Examined) -> Iterator[str]:
    model = _values(Model, _section(seen.raw, "model"), "layers", "hidden", "heads", "kv_heads")
    moe = _values(Experts, _section(seen.raw, "model", "moe"), "experts", "experts_per_token", "every")
    if model is not None:
        without = {"experts": 0, "experts_per_token": 1, "every": 1}  # the schema check has refused the experts
        yield from _located(size_errors(**model, **(moe or without)), seen.where)


def _objectives(seen: Examined) -> Iterator[str]:
    from tiphys.pretrain.tokens.paradigms import PARADIGMS, paradigm_errors

    named, where = _section(seen.raw, "objectives"), seen.where
    for name, options in named.items():
        paradigm = options.get("paradigm") if isinstance(options, dict) else None
        yield from _located(paradigm_errors(name, paradigm or ""), where)
    mixture = _section(seen.raw, "data").get("mixture")
    if not mixture:
        yield f"{where('data.mixture')} is empty; write at least one entry {{dataset: …}}"
    for i, entry in enumerate(mixture if isinstance(mixture, list) else ()):
        wanted = entry.get("objective", "gato") if isinstance(entry, dict) else "gato"
        if wanted not in named and wanted not in PARADIGMS:
            near = difflib.get_close_matches(str(wanted), [*named, *PARADIGMS], n=1)
            hint = (
                f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(dict.fromkeys([*named, *PARADIGMS]))}."
            )
            yield f"{where(f'data.mixture[{i}].objective')}: no objective is called {wanted!r}. {hint}"


def _data(recipe: Recipe, seen: Examined) -> Iterator[str]:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.launch.check_data import data_errors
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
        objectives = Objectives(recipe, indexes)
    except ValueError as error:
        yield f"{seen.where('objectives')}: {error}"
    else:
        yield from data_errors(recipe, indexes, objectives, seen.where)
