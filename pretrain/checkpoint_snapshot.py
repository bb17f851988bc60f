"""A snapshot of training in memory, which a thread can write while training goes on."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tiphys.dataio.atomic import atomic_path, write_json
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.checkpoint_files import CheckpointError, WriteError
from tiphys.pretrain.distributed import deepspeed_state as state_of

if TYPE_CHECKING:
    from tiphys.pretrain.engine import Engine


@dataclass
class Snapshot:
    """One rank's part of a checkpoint, in host memory. `save` identifies this save; it is the same on all ranks."""

    step: int
    rank: int
    world: int
    save: str
    tensors: dict[str, torch.Tensor]
    index: list[dict[str, Any]]
    rng: dict[str, str]
    state: dict[str, Any] = field(default_factory=dict)  # rank 0 only: what goes into state.json


class Piece(NamedTuple):
    start: int
    stop: int
    rank: int
    step: float


class Buffers:
    """Host memory that snapshots are copied to. It is allocated once and used by every snapshot of an engine.

    New memory for each snapshot would raise the peak: the allocator cannot always use what an earlier snapshot gave back.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, view: torch.Tensor) -> torch.Tensor:
        """The buffer of this name, with the shape and type of `view`."""
        held = self._held.get(name)
        if held is None or held.shape != view.shape or held.dtype != view.dtype:
            # a GPU copies to pinned memory several times as fast
            held = torch.zeros(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
            self._held[name] = held
        return held

    def copy(self, name: str, view: torch.Tensor) -> torch.Tensor:
        return self.allocate(name, view).copy_(view.detach())


def allocate(engine: Engine, buffers: Buffers) -> None:
    """Allocate what the snapshots of an engine need. Not collective. Raises UnknownState if the engine cannot be saved."""
    state_of.materialise(engine.deepspeed)
    for fragment in state_of.fragments(engine.deepspeed, engine.address):
        for key, view in fragment.views.items() if fragment.owner else ():
            buffers.allocate(tensor_name(fragment.name, fragment.start, key), view)


def snapshot(engine: Engine, save: str, state: Mapping[str, Any], buffers: Buffers | None = None) -> Snapshot:
    """Copy what this rank owns. Not collective. Raises CheckpointError if the engine's state cannot be saved now.

    buffers   where to; the snapshot is valid until the next one with the same buffers
    """
    buffers = buffers or Buffers()
    if state_of.inside_accumulation(engine.deepspeed):
        raise CheckpointError(
            "a checkpoint between the micro-batches of a step would lose their gradients; save after the step"
        )
    state_of.materialise(engine.deepspeed)
    tensors: dict[str, torch.Tensor] = {}
    index: list[dict[str, Any]] = []
    for fragment in state_of.fragments(engine.deepspeed, engine.address):
        _check_weight(fragment)
        if not fragment.owner:
            continue
        step = float(fragment.slot["step"]) if fragment.slot is not None else None
        _add(buffers, tensors, index, fragment.name, fragment.shape, fragment.start, fragment.views, step)
    if engine.world.replica == 0:
        for name, buffer in engine.buffers():
            _add(buffers, tensors, index, name, tuple(buffer.shape), 0, {"buffer": buffer.reshape(-1)}, None)
    progress = state_of.progress(engine.deepspeed) if engine.world.rank == 0 else {}
    meta = {**state, "engine": progress} if engine.world.rank == 0 else {}
    return Snapshot(engine.step, engine.world.rank, engine.world.world, save, tensors, index, random_states(), meta)


def tensor_name(name: str, start: int, key: str) -> str:
    return f"{name}@{start}|{key}"


def _add(
    buffers: Buffers,
    tensors: dict[str, torch.Tensor],
    index: list[dict[str, Any]],
    name: str,
    shape: Sequence[int],
    start: int,
    views: Mapping[str, torch.Tensor],
    step: float | None,
) -> None:
    numel = 0
    for key, view in views.items():
        tensor = tensor_name(name, start, key)
        tensors[tensor] = buffers.copy(tensor, view)
        numel = view.numel()
    index.append(
        {"name": name, "shape": list(shape), "start": start, "numel": numel, "keys": list(views), "step": step}
    )


def _check_weight(fragment: state_of.Fragment) -> None:
    """Raises CheckpointError if the weight that the model computes with is not the rounded master."""
    master, weight = fragment.views.get("master"), fragment.weight
    if master is None or weight is None:
        return
    if not torch.equal(master.to(weight.dtype).to(weight.device), weight):
        why = (
            "holds NaN" if bool(torch.isnan(master).any()) else "differs from the weights that the model computes with"
        )
        stop = fragment.start + fragment.numel
        raise CheckpointError(
            f"{fragment.name}[{fragment.start}:{stop}]: the fp32 master {why}; this checkpoint is not saved"
        )


def write(
    snap: Snapshot,
    run_dir: str | Path,
    timeout: float = 1800.0,
    *,
    permit: Callable[[], None] = lambda: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path:
    """Write one rank's part. Rank 0 then waits for the other ranks and commits; the folder counts from then on.

    `permit` and `cancelled` are those of `checkpoint_files.commit`. Raises WriteError if a file cannot be written.
    """
    folder = files.folder_of(run_dir, snap.step)
    tensors, name = files.rank_files(snap.rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files.MANIFEST).unlink(
            missing_ok=True
        )  # before files are replaced, an older save of this step stops counting
        with atomic_path(folder / tensors) as path:
            save_file(snap.tensors, path)
        index = {"save": snap.save, "file": files.digest(folder / tensors), "fragments": snap.index, "rng": snap.rng}
        write_json(folder / name, index)
        if snap.rank == 0:
            files.commit(
                folder, snap.step, snap.world, snap.save, snap.state, timeout, permit=permit, cancelled=cancelled
            )
    except (OSError, SafetensorError) as error:
        report_failure(folder / name, snap.save, error)
        raise WriteError(f"{folder}: not written, so this checkpoint does not exist: {error}") from error
    return folder


def report_failure(path: Path, save: str, error: Exception) -> None:
    """Write the error for rank 0, which waits for this rank's part. If this fails too, rank 0 waits until its timeout."""
    try:
        write_json(path, {"save": save, "error": str(error)})
    except OSError:
        return


def random_states() -> dict[str, str]:
    """State of torch's random generators, which dropout uses. All other randomness is a function of seed, step and row."""
    out = {"cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    if torch.cuda.is_available():
        out["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return out


def set_random_states(states: Mapping[str, str]) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(tensor(states["cpu"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(states["cuda"]))
