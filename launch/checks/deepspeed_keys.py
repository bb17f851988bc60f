"""The keys of `deepspeed:` outside optimizer and schedule: which exist, their types and ranges, which cannot be used."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import types
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from tiphys.launch.checks.values import Error, Value, number, switch, table_errors, text, type_problem, unknown, whole
from tiphys.pretrain.distributed.deepspeed_config import derive
from tiphys.pretrain.parallel import Grid, LayoutError

if TYPE_CHECKING:
    from tiphys.recipes.schema import Recipe

HUGE = 10**15

_TYPES = ("fp32", "fp16", "bf16")
SCALARS: dict[str, Value] = {
    "gradient_clipping": number(low=0, high=1e9),
    "gradient_predivide_factor": number(low=1e-6, high=1e6),
    "gradient_allreduce_op": text("mean", "sum"),
    "communication_data_type": text(*_TYPES),
    "seq_parallel_communication_data_type": text(*_TYPES),
    "steps_per_print": whole(low=1, high=HUGE),
    "log_level": text("debug", "info", "warning", "error", "critical"),
    "vocabulary_size": whole(low=1, high=HUGE),
    **dict.fromkeys(
        """dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation memory_breakdown
        prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer""".split(),
        switch(),
    ),
}
# Sections without a pydantic model in DeepSpeed.
TABLES: dict[str, dict[str, Value]] = {
    "activation_checkpointing": {
        "number_checkpoints": whole(low=1, high=2**20),
        **dict.fromkeys(
            """partition_activations contiguous_memory_optimization cpu_checkpointing profile
            synchronize_checkpoint_boundary""".split(),
            switch(),
        ),
    },
    "data_types": {"grad_accum_dtype": text(*_TYPES)},
    "flops_profiler": {
        "enabled": switch(),
        "recompute_fwd_factor": number(low=0, high=100),
        "profile_step": whole(low=1, high=HUGE),
        "module_depth": whole(low=-1, high=3),
        "top_modules": whole(low=1, high=1000),
        "detailed": switch(),
        "output_file": Value(str),
    },
    "pipeline": {
        "activation_checkpoint_interval": whole(low=0, high=4096),
        **dict.fromkeys(("seed_layers", "pipe_partitioned", "grad_partitioned", "use_reentrant"), switch()),
    },
    # These may only say that they are off: `section_errors` says why.
    "data_efficiency": {"enabled": switch()},
    "expert_parallel": {"enabled": switch()},
    "hybrid_engine": {"enabled": switch()},
    "tensor_parallel": {"autotp_size": whole(low=0, high=2**14)},
    "torch_autocast": {"enabled": switch()},
}
_MONITOR, _PRECISION = "deepspeed.monitor.config", "deepspeed.runtime.precision_config"
MODELS: dict[str, tuple[str, str]] = {  # section -> module and name of its model
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": (_PRECISION, "DeepSpeedBF16Config"),
    "bfloat16": (_PRECISION, "DeepSpeedBF16Config"),
    "fp16": (_PRECISION, "DeepSpeedFP16Config"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
    "compile": ("deepspeed.compile.config", "CompileConfig"),
    "comet": (_MONITOR, "CometConfig"),
    "csv_monitor": (_MONITOR, "CSVConfig"),
    "tensorboard": (_MONITOR, "TensorBoardConfig"),
    "wandb": (_MONITOR, "WandbConfig"),
}
# Keys that DeepSpeed knows and that a run does not use.
USELESS = {
    "aio": "nothing is kept on NVMe",
    "autotuning": "it is a mode of DeepSpeed's own command, which `tiphys train` does not use",
    "checkpoint": "Tiphys writes its own checkpoints; use the section `checkpoint` of the recipe",
    "weight_quantization": "it is made for inference",
    "timers": "step times are measured by Tiphys",
}
# Checked by the rules of optimizer, schedule and batch.
_BY_RULES = (
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_ELSEWHERE = {
    "batch_size": "train_batch_size",
    "clip_grad": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "zero": "zero_optimization",
    "lr_scheduler": "scheduler",
}
_IN_OPTIMIZER = {"learning_rate", "lr", "weight_decay", "betas", "eps"}
_PACKAGES = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}


def key_errors(config: Mapping[str, Any], device: bool) -> Iterator[Error]:
    """What is wrong with the keys of a `deepspeed:` section. `device`: whether this machine has a GPU."""
    removed = removed_keys()
    known = {*SCALARS, *TABLES, *MODELS, *_BY_RULES}
    for name, value in config.items():
        at = f"deepspeed.{name}"
        if name in _BY_RULES:
            continue
        if name in removed:
            yield at, f"this version of DeepSpeed has removed it: {removed[name]}"
        elif name in USELESS:
            yield at, f"has no use here: {USELESS[name]}; remove it"
        elif name in _IN_OPTIMIZER:
            key = "lr" if name == "learning_rate" else name
            yield at, f"DeepSpeed has no such key; write deepspeed.optimizer.params.{key}"
        elif name not in known:
            yield at, unknown(name, known, _ELSEWHERE)
        elif name in SCALARS:
            yield from table_errors("deepspeed", {name: value}, SCALARS)
        elif not isinstance(value, dict):
            more = "; write {enabled: auto}" if value == "auto" and name == "bf16" else ""
            yield at, f"must be a section with keys, not {value!r}{more}"
        elif name in TABLES:
            yield from table_errors(at, value, TABLES[name])
        else:
            yield from _model_errors(name, value)
            if name == "zero_optimization":
                yield from _zero_errors(at, value, device)
            masters = f"{'fp16' if name == 'fp16' else 'bf16'}_master_weights_and_grads"
            if value.get(masters):
                yield f"{at}.{masters}", "a checkpoint holds fp32 master weights; remove it"


def config_errors(recipe: Recipe, world: int) -> Iterator[Error]:
    """What DeepSpeed itself says about the configuration that a run would give it: a net below the rules of this file.

    world  number of processes; 0: as few as the layout needs
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    layout = recipe.parallel
    grid = Grid(0, world or layout.pipeline * layout.expert, layout.pipeline, layout.expert)
    try:
        derived = derive(recipe, grid)
    except LayoutError:
        return  # another number of processes is needed; the layout rules say so if it is known
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:  # outside a run DeepSpeed believes that it has one process
        DeepSpeedConfig({**derived.config, "train_batch_size": derived.rows_per_rank})
    except Exception as error:
        yield "deepspeed", f"DeepSpeed refuses the section: {' '.join(str(error).split())}"
    finally:
        logger.setLevel(level)


def removed_keys() -> dict[str, str]:
    """Keys that the installed version of DeepSpeed refuses, with its reasons."""
    config = importlib.import_module("deepspeed.runtime.config")
    return dict(getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}))


def _model_errors(name: str, values: dict[str, Any]) -> Iterator[Error]:
    module, model = MODELS[name]
    at = f"deepspeed.{name}"
    yield from pydantic_errors(at, getattr(importlib.import_module(module), model), values)
    if name == "comet" and values.get("api_key"):
        yield (
            f"{at}.api_key",
            "a recipe is stored in checkpoints and policies; set COMET_API_KEY in the environment instead",
        )
    package = _PACKAGES.get(name)
    if values.get("enabled") is True and package and importlib.util.find_spec(package) is None:
        yield at, f"needs the package {package}, which is not installed; run `pip install {package}`"


def _zero_errors(at: str, values: Mapping[str, Any], device: bool) -> Iterator[Error]:
    bucket = values.get("allgather_bucket_size")
    if isinstance(bucket, int) and (bucket < 2 or bucket % 2):
        yield f"{at}.allgather_bucket_size", f"{bucket} is not allowed; allowed: an even number, at least 2"
    if values.get("compute_grad_norm") is False:
        yield f"{at}.compute_grad_norm", "the gradient norm is part of the metrics"
    if values.get("legacy_stage1"):
        yield f"{at}.legacy_stage1", "DeepSpeed has no old stage 1 any more"
    if values.get("stage") == 3:
        for name in ("module_granularity_threshold", "stage3_module_granularity_threshold"):
            if values.get(name) not in (None, 0, "auto"):
                yield f"{at}.{name}", "the parameters of single modules are gathered when they are used; remove it"
    offload = values.get("offload_optimizer")
    if isinstance(offload, dict):
        if offload.get("super_offload"):
            yield f"{at}.offload_optimizer.super_offload", "a checkpoint does not know where it keeps its state"
        if not device and offload.get("ratio") not in (None, 1, "auto"):
            yield f"{at}.offload_optimizer.ratio", "without a GPU there is only one place for the state; remove it"


def pydantic_errors(at: str, model: Any, values: Mapping[str, Any]) -> Iterator[Error]:
    """What a pydantic model of DeepSpeed finds wrong; and values that it would silently convert, such as a text to a number."""
    from pydantic import ValidationError

    given = _without_auto(values)
    found = list(_convertible(at, model, given))
    reported = {path for path, _ in found}
    try:
        model(**given)
    except ValidationError as error:
        for one in error.errors():
            path = ".".join([at, *(str(x) for x in one["loc"])])
            if any(path.startswith(known) for known in reported):
                continue
            reported.add(path)
            if one["type"] == "extra_forbidden":
                found.append((path, unknown(str(one["loc"][-1]), _known(model, one["loc"][:-1]))))
            else:
                found.append((path, f"{one['input']!r} is not allowed: {one['msg']}" if one["loc"] else one["msg"]))
    except (ValueError, TypeError, AssertionError) as error:
        found.append((at, str(error)))
    yield from found


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = ((key, _without_auto(value) if isinstance(value, dict) else value) for key, value in values.items())
    return {key: value for key, value in kept if value != "auto"}


def _fields(model: Any) -> dict[str, Any]:
    """Name and alias of each field of a model -> its type."""
    named = {name: field.annotation for name, field in model.model_fields.items()}
    return named | {f.alias: f.annotation for f in model.model_fields.values() if f.alias}


def _known(model: Any, path: tuple[Any, ...]) -> list[str]:
    for name in path:
        model = _plain_type(_fields(model).get(name))[0]
    return list(_fields(model)) if hasattr(model, "model_fields") else []


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """The type without `None`, and whether `None` is allowed. Any if it is a union of several types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return (parts[0] if len(parts) == 1 else Any), type(None) in typing.get_args(hint)
    return hint, False


def _convertible(at: str, model: Any, values: Mapping[str, Any]) -> Iterator[Error]:
    known = _fields(model)
    for name, value in values.items():
        hint, optional = _plain_type(known.get(name))
        path = f"{at}.{name}"
        if name not in known or (value is None and optional):
            continue
        if hasattr(hint, "model_fields"):
            if isinstance(value, dict):
                yield from _convertible(path, hint, value)
            else:
                yield path, f"must be a section with keys, not {value!r}"
        elif isinstance(hint, type) and issubclass(hint, Enum):
            words = [member.value for member in hint]
            if isinstance(value, bool) or value not in words:
                yield path, f"{value!r} is not allowed; allowed: {', '.join(map(str, words))}"
        elif hint in (bool, int, float, str, list):
            if wrong := type_problem(hint, value, integral=True):
                yield path, wrong
            elif hint in (int, float) and abs(value) > HUGE * 10**4:
                yield path, f"{value!r} is out of range"
