"""ParallelDims: who is where. Every size, rank and process group that another module needs comes from here.

The ranks of a launch form a grid [pipeline, data], stage by stage, as DeepSpeed lays them out: rank = stage · data + replica.
Expert parallelism divides the data-parallel ranks of one stage: `expert` neighbours hold the experts of a layer between them.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tiphys.dataio.placement import Home
    from tiphys.recipes.schema import Parallel


class LayoutError(ValueError):
    """A layout that cannot run. The message says which sizes do not fit and what would."""


class PeerLost(RuntimeError):
    """Another process of this launch is gone or cannot be reached, so a collective operation failed."""


@contextmanager
def _collective() -> Iterator[None]:
    """Gloo raises a plain RuntimeError if a connection breaks or times out; this turns it into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error


def lost_peer(error: BaseException) -> bool:
    """True if `error` says that another process of this launch is gone or cannot be reached.

    Collectives of `ParallelDims` raise PeerLost, and NCCL raises torch's DistError. In other collectives, such as DeepSpeed's,
    gloo raises a plain RuntimeError. It counts if it was raised by a call of torch.distributed or by DeepSpeed's wait for one.
    """
    import deepspeed
    import torch.distributed

    if isinstance(error, PeerLost | torch.distributed.DistError):
        return True
    if type(error) is not RuntimeError:
        return False
    torchs, deepspeeds = Path(torch.distributed.__file__).parent, Path(deepspeed.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    if any(Path(frames[-1].filename).is_relative_to(folder) for folder in (torchs, deepspeeds / "comm")):
        return True
    # `handle.wait()` is compiled code: the last line of Python is the one that calls it, or DeepSpeed's wrapper around it.
    return any(Path(f.filename).is_relative_to(deepspeeds) and ".wait" in (f.line or "") for f in frames)


@dataclass(frozen=True)
class Grid:
    """The arithmetic of a layout, without a process group: sizes and where one rank stands."""

    rank: int
    world: int
    pipeline: int
    expert: int

    def __post_init__(self) -> None:
        for name in ("pipeline", "expert"):
            if getattr(self, name) < 1:
                raise LayoutError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        if self.world % self.pipeline:
            raise LayoutError(
                f"parallel.pipeline: {self.pipeline} stages do not divide {self.world} processes; "
                f"start a multiple of {self.pipeline}"
            )
        if self.data % self.expert:
            raise LayoutError(
                f"parallel.expert: {self.expert} does not divide the {self.data} data-parallel processes "
                f"({self.world} processes / {self.pipeline} stages)"
            )

    @property
    def data(self) -> int:
        """Data-parallel size: the number of pipeline replicas."""
        return self.world // self.pipeline

    @property
    def stage(self) -> int:
        return self.rank // self.data

    @property
    def replica(self) -> int:
        """This rank's number among the data-parallel ranks of its stage."""
        return self.rank % self.data

    @property
    def expert_rank(self) -> int:
        """Which slice of each expert layer this rank holds: 0 … expert − 1."""
        return self.replica % self.expert

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipeline - 1


class ParallelDims(Grid):
    """The grid of this launch, with its process groups. Starts torch.distributed if nobody has.

    local    this process' number on its machine
    device   where the model lives: the accelerator's device, or the CPU
    """

    local: int
    device: torch.device
    control: Any

    def __init__(self, parallel: Parallel) -> None:
        import torch.distributed as dist

        initialise()
        super().__init__(dist.get_rank(), dist.get_world_size(), parallel.pipeline, parallel.expert)
        set_ = object.__setattr__
        set_(self, "local", int(os.environ.get("LOCAL_RANK", "0")))
        set_(self, "device", _device(self.local))
        # Counts and decisions travel on the CPU, in a group of their own: they neither wait for the accelerator's
        # queue nor come between DeepSpeed's collectives.
        set_(self, "control", dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if self.world > 1 else None)

    @property
    def home(self) -> Home:
        """Which share of every global batch this process' loader serves: one loader a pipeline replica."""
        from tiphys.dataio.placement import Home

        return Home(process=self.replica, processes=self.data, weights=None)

    def sum(self, values: Sequence[float]) -> Sum:
        """Start the sum of a few float64 numbers over all ranks; `result()` waits for it.

        All ranks must ask for the same sums in the same order.
        """
        return Sum(self.control, values)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small value, by rank. Values pass through pickle between the launch's own processes only."""
        if self.control is None:
            return [value]
        import torch.distributed as dist

        out: list[Any] = [None] * self.world
        with _collective():
            dist.all_gather_object(out, value, group=self.control)
        return out

    def barrier(self) -> None:
        if self.control is not None:
            import torch.distributed as dist

            with _collective():
                dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the process group; nothing collective works afterwards."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


class Sum:
    """A sum over all ranks under way."""

    def __init__(self, group: Any, values: Sequence[float]) -> None:
        import torch
        import torch.distributed as dist

        self._tensor = torch.tensor(list(values), dtype=torch.float64)
        self._work = None
        if group is not None:
            with _collective():
                self._work = dist.all_reduce(self._tensor, group=group, async_op=True)

    def result(self) -> list[float]:
        if self._work is not None:
            with _collective():
                self._work.wait()
            self._work = None
        return self._tensor.tolist()


def initialise() -> None:
    """Start torch.distributed under DeepSpeed from the launcher's environment; alone, as a world of one process."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if "RANK" not in os.environ:  # no launcher: port 0 lets the system choose one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # DeepSpeed calls collectives by names that torch has renamed; the warning comes at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this op with g++ at the first start, for a minute or two; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    else:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _device(local: int) -> torch.device:
    import torch
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(local))
