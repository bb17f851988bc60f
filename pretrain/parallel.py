"""Where each rank of a launch belongs. Every size, rank and process group that another module needs comes from here.

The ranks form a grid [pipeline, data], stage by stage, as in DeepSpeed: rank = stage · data + replica. Expert parallelism divides
the data-parallel ranks of one stage into groups of `expert` neighbours; the experts of a layer are divided among such a group.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.errors import Explained
from tiphys.pretrain.distributed.layout_errors import Error, grid_errors
from tiphys.pretrain.phases import collective, mark

if TYPE_CHECKING:
    import torch

    from tiphys.dataio.placement import Home
    from tiphys.recipes.sections.training import Parallel


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LayoutError(Explained, ValueError):
    """A layout that cannot run. The message has a line `key: reason` for each rule that is broken."""


def refuse(errors: Iterable[Error]) -> None:
    """Raises LayoutError with all of the (key path, reason); does nothing if there are none."""
    lines = [f"{key}: {reason}" for key, reason in errors]
    if lines:
        raise LayoutError("\n".join(lines))


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
    """The arithmetic of a layout, without a process group: its sizes and the place of one rank.

    Raises LayoutError if the processes cannot be divided like this.
    """

    rank: int
    world: int
    pipeline: int
    expert: int

    def __post_init__(self) -> None:
        refuse(grid_errors(self.world, self.pipeline, self.expert))

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

    local    this process' number on its machine
    device   where the model is: the accelerator's device, or the CPU
    control  process group of the CPUs, for counts and decisions; None if there is one process
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
        # Counts and decisions are exchanged between CPUs, in a group of their own: so they do not wait for the accelerator's
        # queue and do not mix with DeepSpeed's collectives.
        set_(self, "control", dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if self.world > 1 else None)

    @property
    def home(self) -> Home:
        """Which share of every global batch this process' loader serves. Each pipeline replica has one loader."""
        from tiphys.dataio.placement import Home

        return Home(process=self.replica, processes=self.data, weights=None)

    def sum(self, values: Sequence[float]) -> Sum:
        """Start to sum a few float64 numbers over all ranks; `result()` waits for the sum.

        All ranks must call this in the same order, with equally many values.
        """
        return Sum(self.control, values)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small value, by rank. It travels as JSON: nothing that comes over the network is unpickled."""
        content = json.dumps(value).encode()
        if self.control is None:
            return [json.loads(content)]
        import torch
        import torch.distributed as dist

        sizes = [int(n) for n in self.sum([len(content) if r == self.rank else 0 for r in range(self.world)]).result()]
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in sizes]
        with _collective():
            work = dist.all_gather(parts, mine, group=self.control, async_op=True)
            collective()
            work.wait()
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.control is not None:
            import torch.distributed as dist

            with _collective():
                work = dist.barrier(group=self.control, async_op=True)
                collective()
                work.wait()

    def close(self) -> None:
        """Leave the process group. No collective works afterwards."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


class Sum:
    """A sum over all ranks that has been started."""

    def __init__(self, group: Any, values: Sequence[float]) -> None:
        import torch
        import torch.distributed as dist

        self._tensor = torch.tensor(list(values), dtype=torch.float64)
        self._work = None
        if group is not None:
            with _collective():
                self._work = dist.all_reduce(self._tensor, group=group, async_op=True)
            collective()

    def result(self) -> list[float]:
        if self._work is not None:
            with _collective():
                self._work.wait()
            self._work = None
        return self._tensor.tolist()


def initialise() -> None:
    """Start torch.distributed by DeepSpeed from the launcher's environment; without a launcher, for one process."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if "RANK" not in os.environ:  # no launcher: port 0 lets the system choose one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    mark("meet")
    # DeepSpeed calls collectives by their old names, and torch warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    options: Any = {"auto_mpi_discovery": False, "verbose": False, "init_method": _meeting_place()}
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this op with g++ at the first start, for a minute or two. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", **options)
    else:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(**options)
    mark("start")


def _meeting_place() -> str | None:
    """How the ranks meet, as an `init_method` of torch.distributed; None: as the launcher's variables say.

    If all ranks are on this machine, they meet and talk over the loopback interface, which no other machine can reach. By itself
    torch listens at every address, and gloo and NCCL at that of the machine.
    """
    if os.environ.get("MASTER_ADDR") not in _LOOPBACK:
        return None
    from torch.distributed import register_rendezvous_handler

    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
    for library in ("GLOO", "NCCL") if interface else ():
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    with suppress(RuntimeError):  # it is registered already
        register_rendezvous_handler("tiphys-loopback", _meet)
    return "tiphys-loopback://"


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Any, int, int]]:
    from torch.distributed import TCPStore

    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    more: dict[str, Any] = {}
    if rank == 0:
        listening = socket.create_server(("127.0.0.1", port))
        port, more = listening.getsockname()[1], {"is_master": True, "master_listen_fd": listening.detach()}
    yield TCPStore("127.0.0.1", port, world, timeout=timeout, **more), rank, world
    raise RuntimeError("the ranks cannot meet a second time")


def _device(local: int) -> torch.device:
    import torch
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name(local))
