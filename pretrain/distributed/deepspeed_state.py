"""Where a DeepSpeed engine keeps masters, moments and weights. All uses of DeepSpeed's private attributes are in this file.

DeepSpeed flattens parameters into groups and gives each data-parallel rank a range of each group. Which range, and in which
attribute, depends on the ZeRO stage and the optimizer wrapper. `fragments` gives all of them one form: flat ranges of named
parameters, as live views. Tested with DeepSpeed 0.19.4 … 0.19.8 (pyproject.toml pins the range).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state, besides `step`
AVERAGE = "ema"  # the average of the masters, which lies beside the moments
WRAPPERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")


class UnknownState(TypeError):
    """This file does not know where the engine keeps its optimizer state."""


class Address(NamedTuple):
    """Where a local parameter is in the whole model, on any layout.

    name    canonical name
    start   flat offset of its first element in the canonical parameter (an expert rank holds a slice of a stack)
    shape   canonical shape
    """

    name: str
    start: int
    shape: tuple[int, ...]


Named = Callable[[str, torch.nn.Parameter, tuple[int, ...]], Address]


@dataclass
class Fragment:
    """The flat range [start, start + numel) of a canonical parameter that this rank holds.

    views    key (master, exp_avg, exp_avg_sq and perhaps ema, or frozen) -> live flat tensor of `numel` elements
    weight   the same range of the weight that the model computes with; None if a view is that weight itself
    slot     the optimizer's entry that holds `step`
    owner    False: another rank saves this range
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    views: dict[str, torch.Tensor]
    weight: torch.Tensor | None = None
    slot: dict[str, Any] | None = None
    owner: bool = True


def check(engine: Any) -> None:
    """Raises UnknownState if masters or moments of the engine's optimizer cannot be found."""
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if name not in WRAPPERS and not isinstance(optimizer, torch.optim.Optimizer):
        raise UnknownState(f"{name}: unknown optimizer wrapper; a checkpoint would not contain its masters or moments")
    base = _base(optimizer)
    if not any(cls.__name__ in ("Adam", "FusedAdam", "DeepSpeedCPUAdam") for cls in type(base).__mro__):
        raise UnknownState(f"{type(base).__name__}: only Adam and AdamW state can be saved")
    if getattr(optimizer, "swap_optimizer", False):
        raise UnknownState("optimizer state offloaded to NVMe cannot be saved; offload to the CPU instead")


def inside_accumulation(engine: Any) -> bool:
    """True between the micro-batches of a step: there are gradients that the optimizer state does not contain."""
    return engine.micro_steps % engine.gradient_accumulation_steps() != 0


def materialise(engine: Any) -> None:
    """Before the first step, create Adam's state with zeros, as that step would. Raises UnknownState if it is lost later."""
    check(engine)
    base = _base(engine.optimizer)
    for flat in _flats(engine.optimizer):
        state = base.state[flat]
        if state:
            continue
        if engine.global_steps > engine.skipped_steps:
            raise UnknownState(f"after {engine.global_steps} steps the optimizer has no moments in the expected place")
        state["step"] = torch.tensor(0.0) if isinstance(base, torch.optim.Adam) else 0
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat.data)


def keep_average(engine: Any) -> None:
    """Begin an average of the masters; it is their value until `advance_average`. Raises UnknownState as `materialise` does."""
    materialise(engine)
    state = _base(engine.optimizer).state
    for flat in _flats(engine.optimizer):
        state[flat][AVERAGE] = flat.data.clone()


@torch.no_grad()
def advance_average(engine: Any, kept: float) -> None:
    """average = kept · average + (1 − kept) · master. Not collective.

    Two roundings for each element, wherever it lies in a flat tensor: a fused operation would round the ends of a tensor
    differently.
    """
    state = _base(engine.optimizer).state
    for flat in _flats(engine.optimizer):
        average = state[flat][AVERAGE]
        average.mul_(kept)
        average.add_(flat.data * (1 - kept))


def fragments(engine: Any, named: Named) -> Iterator[Fragment]:
    """All ranges of all parameters that this rank holds, in the model's order. Not collective.

    named   (local name, parameter, local shape) -> its address in the whole model
    """
    check(engine)
    finder = _finder(engine)
    for local, parameter in engine.module.named_parameters():
        if hasattr(parameter, "placeholder"):  # `NoExperts` of model/expert_parallel.py, not part of the model
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        address = named(local, parameter, shape)
        fragment = finder(parameter, address)
        if fragment is not None:
            yield fragment


def set_step(engine: Any, step: float) -> None:
    """Set Adam's step counter of every flat tensor, also of those that hold only padding on this rank."""
    base = _base(engine.optimizer)
    for flat in _flats(engine.optimizer):
        state = base.state[flat]
        if torch.is_tensor(state["step"]):
            state["step"].fill_(step)
        else:
            state["step"] = int(step)
    for group in base.param_groups:
        if "step" in group:  # FusedAdam also counts in each group
            group["step"] = int(step)


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Copy the masters into the weights that the model computes with. Collective."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        optimizer._partition_all_parameters()  # small parameters stay gathered between steps: release them first
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO-1/2, BF16_Optimizer
        optimizer.update_lp_params()


def progress(engine: Any) -> dict[str, Any]:
    """Counters, schedule and the optimizer's current hyperparameters, as JSON."""
    group = _base(engine.optimizer).param_groups[0]
    scheduler = engine.lr_scheduler
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "scheduler": _plain(scheduler.state_dict()) if scheduler is not None else None,
        "hyperparameters": {key: _plain(group[key]) for key in ("lr", "betas") if key in group},
    }


def set_progress(engine: Any, state: dict[str, Any]) -> None:
    """Restore what `progress` returned."""
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, int(state[key]))
    engine.micro_steps = (
        engine.global_steps * engine.gradient_accumulation_steps()
    )  # of this layout, not of the one that saved
    if engine.lr_scheduler is not None and state["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["scheduler"])
    for group in _base(engine.optimizer).param_groups:  # DeepSpeed's schedules do not restore these
        for key, value in state["hyperparameters"].items():
            group[key] = tuple(value) if isinstance(value, list) else value


def gradient_norm(engine: Any) -> float | torch.Tensor:
    """Norm of the last step's gradient before clipping. Without ZeRO, call it before the step."""
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    if norm is None:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]))
    return norm


def learning_rate(engine: Any) -> float:
    return float(_base(engine.optimizer).param_groups[0]["lr"])


def time_passes(engine: Any, span: Callable[[], AbstractContextManager[None]]) -> None:
    """Run each forward pass and each backward pass of a pipeline stage inside a `span()`."""

    def timed(instruction: Callable[..., None]) -> Callable[..., None]:
        def run(self: Any, **arguments: Any) -> None:
            with span():
                instruction(self, **arguments)

        return run

    engine._INSTRUCTION_MAP = {
        kind: timed(instruction) if kind.__name__ in ("ForwardPass", "BackwardPass") else instruction
        for kind, instruction in engine._INSTRUCTION_MAP.items()
    }


def forget_groups() -> None:
    """Drop DeepSpeed's global record of pipeline and expert groups, so that this process can use another layout next."""
    from deepspeed.utils import groups

    groups.mpu = None
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        setattr(groups, name, {})
        setattr(groups, f"{name}_RANKS", {})


# ---------------------------------------------------------------------------------------------------------------------


def _base(optimizer: Any) -> Any:
    """The optimizer that does the step: the wrapped one if there is a wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _flats(optimizer: Any) -> list[torch.Tensor]:
    """The fp32 tensors that the base optimizer updates."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return [p for group in optimizer.param_groups for p in group["params"]]


def _finder(engine: Any) -> Callable[[Any, Address], Fragment | None]:
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _Partitioned(engine)
    if hasattr(optimizer, "round_robin_bit16_groups"):
        return _Flattened(engine, _round_robin_places(optimizer), optimizer.single_partition_of_fp32_groups)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _Flattened(engine, _mapped_places(optimizer), optimizer.fp32_groups_flat_partition)
    return _Whole(engine)


class _Finder:
    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.state = _base(engine.optimizer).state

    def saves(self, parameter: Any) -> bool:
        """Whether this rank saves a parameter that several ranks hold whole."""
        if getattr(parameter, "ds_pipe_replicated", False):  # tied between stages: the first stage saves it
            return False
        group = self.engine.data_parallel_group
        if getattr(parameter, "allreduce", True) is False:
            group = self.engine.expert_data_parallel_group[parameter.group_name]
        return torch.distributed.get_rank(group) == 0

    def views(self, flat: torch.Tensor, start: int, numel: int) -> dict[str, torch.Tensor]:
        state = self.state[flat]
        span = slice(start, start + numel)
        moments = {key: state[key].view(-1)[span] for key in (*MOMENTS, AVERAGE) if key in state}
        return {"master": flat.data.view(-1)[span], **moments}

    def frozen(self, parameter: Any, address: Address) -> Fragment:
        data = parameter.data.view(-1)
        views = {"frozen": data}
        return Fragment(address.name, address.shape, address.start, data.numel(), views, owner=self.saves(parameter))


class _Whole(_Finder):
    """No ZeRO, fp32: every rank holds everything."""

    def __call__(self, parameter: Any, address: Address) -> Fragment:
        if not parameter.requires_grad:
            return self.frozen(parameter, address)
        numel = parameter.numel()
        views = self.views(parameter, 0, numel)
        slot = self.state[parameter]
        return Fragment(
            address.name, address.shape, address.start, numel, views, slot=slot, owner=self.saves(parameter)
        )


class _Place(NamedTuple):
    flat: int  # which flat tensor
    at: int  # offset in it
    start: int  # the parameter's element at this offset
    numel: int


def _round_robin_places(optimizer: Any) -> dict[int, _Place]:
    """ZeRO-1/2. Uses the real order, because `_hp_mapping` is wrong with round_robin_gradients."""
    places: dict[int, _Place] = {}
    for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
        size = optimizer.single_partition_of_fp32_groups[group].numel()
        low = torch.distributed.get_rank(optimizer.real_dp_process_group[group]) * size
        for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
            first, last = max(offset, low), min(offset + parameter.numel(), low + size)
            if first < last:
                places[id(parameter)] = _Place(group, first - low, first - offset, last - first)
    return places


def _mapped_places(optimizer: Any) -> dict[int, _Place]:
    """BF16_Optimizer: it keeps the order of the parameters."""
    places: dict[int, _Place] = {}
    for group, parameters in enumerate(optimizer.bf16_groups):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                hp, lp = mapping.hp_fragment_address, mapping.lp_fragment_address
                places[id(parameter)] = _Place(group, hp.start, lp.start, hp.numel)
    return places


class _Flattened(_Finder):
    """ZeRO-1/2 and BF16_Optimizer: each rank has a range of each flat group; every rank has the whole weights."""

    def __init__(self, engine: Any, places: dict[int, _Place], flats: list[torch.Tensor]) -> None:
        super().__init__(engine)
        self.places, self.flats = places, flats

    def __call__(self, parameter: Any, address: Address) -> Fragment | None:
        if not parameter.requires_grad:
            return self.frozen(parameter, address)
        place = self.places.get(id(parameter))
        if place is None:
            return None
        flat = self.flats[place.flat]
        return Fragment(
            address.name,
            address.shape,
            address.start + place.start,
            place.numel,
            self.views(flat, place.at, place.numel),
            weight=parameter.data.view(-1)[place.start : place.start + place.numel],
            slot=self.state[flat],
            owner=not getattr(parameter, "ds_pipe_replicated", False),
        )


class _Partitioned(_Finder):
    """ZeRO-3: the weights are divided among the ranks too."""

    def __call__(self, parameter: Any, address: Address) -> Fragment | None:
        group = getattr(parameter, "ds_process_group", None) or self.engine.data_parallel_group
        part = parameter.partition_numel()
        start = torch.distributed.get_rank(group) * part
        numel = max(0, min(part, parameter.ds_numel - start))
        if numel == 0:  # only padding on this rank
            return None
        where = (address.name, address.shape, address.start + start, numel)
        weight = parameter.ds_tensor.data.view(-1)[:numel]
        if not parameter.requires_grad:
            return Fragment(*where, {"frozen": weight})
        optimizer = self.optimizer
        index, at, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[index]
        return Fragment(*where, self.views(flat, at, numel), weight=weight, slot=self.state[flat])


def _plain(value: Any) -> Any:
    """A scheduler's state as numbers, strings, lists and dicts. Raises UnknownState for anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if torch.is_tensor(value) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    raise UnknownState(
        f"the scheduler's state contains a {type(value).__name__}, which cannot be saved in a checkpoint"
    )
