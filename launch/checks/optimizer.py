"""The parameters of `deepspeed.optimizer` and `scheduler`, by the signatures of the installed classes and our ranges."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from tiphys.launch.checks.values import Error, Value, number, problem, switch, text, unknown, whole

RATE = {"low": 0, "high": 10}
OPTIMIZER: dict[str, Value] = {
    "lr": number(**RATE),
    "eps": number(above=0, high=1),
    "weight_decay": number(low=0, high=100),
    "bias_correction": switch(),
    "fp32_optimizer_states": switch(),
    "set_grad_none": switch(),
    "foreach": switch(),
}
_BETA = number(low=0, below=1)
_OURS = {"torch_adam": switch(), "adam_w_mode": switch()}  # DeepSpeed takes them out before it makes the optimizer
_CANNOT = {
    "amsgrad": "a checkpoint does not hold its state",
    "maximize": "the loss would be maximised",
    "capturable": "steps are not captured as CUDA graphs",
    "differentiable": "nothing differentiates through a step",
    "max_grad_norm": "write deepspeed.gradient_clipping",
}
_MEANT = {"learning_rate": "lr", "epsilon": "eps", "beta": "betas", "wd": "weight_decay", "decay": "weight_decay"}
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
_STEPS = {"high": 10**12}
SCHEDULER: dict[str, Value] = {
    **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr"), number(**RATE)),
    "total_num_steps": whole(low=1, **_STEPS),
    "warmup_num_steps": whole(low=1, **_STEPS),
    "warmup_type": text("log", "linear"),
    "warmup_min_ratio": number(low=0, high=1),
    "cos_min_ratio": number(low=0, high=1),
    "lr_range_test_min_lr": number(above=0, high=10),
    "lr_range_test_step_size": whole(low=1, **_STEPS),
    "lr_range_test_step_rate": number(low=0, high=1e6),
    "lr_range_test_staircase": switch(),
    "cycle_first_step_size": whole(low=1, **_STEPS),
    "cycle_second_step_size": whole(low=1, **_STEPS),
    "cycle_first_stair_count": whole(low=0, **_STEPS),
    "cycle_second_stair_count": whole(low=0, **_STEPS),
    "decay_step_size": whole(low=0, **_STEPS),
    "decay_lr_rate": number(low=0, high=1e6),
    "decay_mom_rate": number(low=0, high=1e6),
    "cycle_momentum": switch(),
    "cycle_min_mom": _BETA,
    "cycle_max_mom": _BETA,
}
_DERIVED = ("total_num_steps", "warmup_max_lr")  # `auto` is replaced by what the recipe says elsewhere
# A warm-up may be longer than the run: trials with `train.steps=2` are common, and every step of them has a learning rate.
_ORDERED = (
    ("warmup_min_lr", "warmup_max_lr"),
    ("cycle_min_lr", "cycle_max_lr"),
    ("cycle_min_mom", "cycle_max_mom"),
)


def optimizer_errors(config: Mapping[str, Any], device: bool) -> Iterator[Error]:
    """What is wrong with `optimizer`. A missing section and a wrong type are errors of the layout rules.

    device  whether this machine has a GPU, which decides the class of the optimizer
    """
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict):
        return
    yield from _section_errors("optimizer", optimizer, ("type", "params", "legacy_fusion"))
    params = optimizer.get("params")
    if params is None or not isinstance(params, dict):
        return
    for name, value in params.items():
        if name in ("torch_adam", "adam_w_mode") and (wrong := problem(_OURS[name], value)) and value != "auto":
            yield f"deepspeed.optimizer.params.{name}", wrong
    made = optimizer_class(config, device)
    accepted = {*list(inspect.signature(made).parameters)[1:], *_OURS}
    known = {name for name in (*OPTIMIZER, *_OURS, "betas") if name in accepted}
    for name, value in params.items():
        at = f"deepspeed.optimizer.params.{name}"
        if name in _CANNOT:
            if value not in (False, "auto") or name not in accepted:
                yield at, f"is not allowed: {_CANNOT[name]}"
        elif name not in known:
            yield at, f"{made.__name__}: {unknown(name, known, _MEANT)}"
        elif name == "betas":
            if value != "auto" and (wrong := _betas(value)):
                yield at, wrong
        elif name in OPTIMIZER and value != "auto" and (wrong := problem(OPTIMIZER[name], value)):
            yield at, wrong


def _betas(value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return f"must be a list of two numbers, such as [0.9, 0.999], not {value!r}"
    return next((wrong for beta in value if (wrong := problem(_BETA, beta))), "")


def optimizer_class(config: Mapping[str, Any], device: bool) -> type:
    """The class of optimizer that DeepSpeed makes of the section."""
    params = config["optimizer"].get("params") or {}
    if not device or params.get("torch_adam") is True:
        adam = config["optimizer"].get("type") == "Adam" and params.get("adam_w_mode") is False
        name, module = ("Adam" if adam else "AdamW"), "torch.optim"
    else:
        zero = config.get("zero_optimization")
        offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
        cpu = isinstance(offload, dict) and offload.get("device") == "cpu"
        name, module = ("DeepSpeedCPUAdam" if cpu else "FusedAdam"), "deepspeed.ops.adam"
    found: type = getattr(importlib.import_module(module), name)
    return found


def scheduler_errors(config: Mapping[str, Any], steps: int) -> Iterator[Error]:
    """What is wrong with `scheduler`. `steps`: of the run, which `total_num_steps: auto` stands for; 0: unknown."""
    scheduler = config.get("scheduler")
    if scheduler is None:
        return
    if not isinstance(scheduler, dict):
        yield (
            "deepspeed.scheduler",
            f"must be a section with keys, not {scheduler!r}; write {{type: WarmupLR, params: {{…}}}}",
        )
        return
    yield from _section_errors("scheduler", scheduler, ("type", "params"))
    kind = scheduler.get("type")
    if kind not in SCHEDULERS:
        near = difflib.get_close_matches(str(kind), SCHEDULERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        yield "deepspeed.scheduler.type", f"DeepSpeed has no schedule {kind!r}; allowed: {', '.join(SCHEDULERS)}.{hint}"
        return
    params = scheduler.get("params") or {}
    if isinstance(params, dict):
        yield from _schedule_errors(kind, params, steps)


def _schedule_errors(kind: str, params: dict[str, Any], steps: int) -> Iterator[Error]:
    at = "deepspeed.scheduler.params"
    made = getattr(importlib.import_module("deepspeed.runtime.lr_schedules"), kind)
    signature = {name: p for name, p in inspect.signature(made).parameters.items() if name in SCHEDULER}
    wrong = False
    for name, value in params.items():
        reason = ""
        if name not in signature:
            reason = f"{kind}: {unknown(name, signature)}"
        elif value != "auto":
            reason = problem(SCHEDULER[name], value)
        if reason:
            wrong = True
            yield f"{at}.{name}", reason
    for name, parameter in signature.items():
        given = params.get(name, "auto") != "auto" or (name in params and name in _DERIVED)
        if parameter.default is inspect.Parameter.empty and not given:
            wrong = True
            more = f"; write for example {name}: auto, the steps of the run" if name == "total_num_steps" else ""
            yield f"{at}.{name}", f"is missing: {kind} needs it{more}"
    if not wrong:
        defaults = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
        auto = {"total_num_steps": steps or None}
        values = {**defaults, **{k: auto.get(k) if v == "auto" else v for k, v in params.items()}}
        for low, high in _ORDERED:
            if values.get(low) is not None and values.get(high) is not None and values[low] > values[high]:
                yield f"{at}.{low}", f"{low} ({values[low]}) is above {high} ({values[high]})"


def _section_errors(name: str, section: dict[str, Any], known: tuple[str, ...]) -> Iterator[Error]:
    for key in section:
        if key not in known:
            yield f"deepspeed.{name}.{key}", unknown(key, known)
    if not isinstance(section.get("params", {}), dict):
        yield f"deepspeed.{name}.params", f"must be a section with keys, not {section['params']!r}"
    if not isinstance(section.get("legacy_fusion", False), bool):
        yield f"deepspeed.{name}.legacy_fusion", "must be true or false"
