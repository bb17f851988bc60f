"""ParallelDims: the grid of processes. All sizes, ranks and process groups that other modules need come from here.

The ranks of a launch form a grid [pipeline, data], stage by stage, in DeepSpeed's order: rank = stage · data + replica.
Expert parallelism divides the data-parallel ranks of a stage: `expert` neighbours together hold the experts of a layer.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tiphys.dataio.placement import Home
    from tiphys.recipes.schema import Parallel


class LayoutError(ValueError):
    """A layout that cannot run. The message says which sizes do not fit, and which would."""


@dataclass(frozen=True)
class Grid:
    """The arithmetic of a layout, without a process group: the sizes and the position of one rank."""

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
        """Number of this rank among the data-parallel ranks of its stage."""
        return self.rank % self.data

    @property
    def expert_rank(self) -> int:
        """Number of the slice of each expert layer that this rank holds: 0 … expert − 1."""
        return self.replica % self.expert

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipeline - 1


class ParallelDims(Grid):
    """The grid of this launch, with its process groups. Starts torch.distributed if it is not running.

    local    number of this process on its machine
    device   device of the model: the accelerator, or the CPU
    control  process group on the CPU for small values; None with one process
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
        # Counts and decisions use a CPU group of their own, so that they do not wait for the accelerator's queue and do not
        # mix with DeepSpeed's collectives.
        set_(self, "control", dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if self.world > 1 else None)

    @property
    def home(self) -> Home:
        """Which share of every global batch this process's loader serves. Each pipeline replica has one loader."""
        from tiphys.dataio.placement import Home

        return Home(process=self.replica, processes=self.data, weights=None)

    def sum(self, values: Sequence[float]) -> Sum:
        """Start to sum a few float64 numbers over all ranks; `result()` waits for the sum.

        All ranks must start the same sums in the same order.
        """
        return Sum(self.control, values)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order. Values must be small; only processes of this launch exchange the pickles."""
        if self.control is None:
            return [value]
        import torch.distributed as dist

        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def barrier(self) -> None:
        if self.control is not None:
            import torch.distributed as dist

            dist.barrier(group=self.control)

    def close(self) -> None:
        """Leave the process group. No collective works afterwards."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


class Sum:
    """A sum over all ranks that has started."""

    def __init__(self, group: Any, values: Sequence[float]) -> None:
        import torch
        import torch.distributed as dist

        self._tensor = torch.tensor(list(values), dtype=torch.float64)
        self._work = dist.all_reduce(self._tensor, group=group, async_op=True) if group is not None else None

    def result(self) -> list[float]:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._tensor.tolist()


def initialise() -> None:
    """Start torch.distributed through DeepSpeed, from the launcher's environment; without a launcher, with one process."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if "RANK" not in os.environ:  # no launcher: port 0 lets the system choose one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # DeepSpeed uses old names of torch's collectives; without this filter every call would warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this op with g++ at the first start, for a minute or two. gloo replaces it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    else:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _device(local: int) -> torch.device:
    import torch
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(local))
