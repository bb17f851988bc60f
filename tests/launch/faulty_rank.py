"""A rank of `tiphys train` with short limits, for tests. In step 25, between two checkpoints, the last rank does what the
environment variable FAULTS says: one word for each launch, divided by commas.

FAULTS  exchange   it sleeps inside an exchange of numbers between the ranks
        reduction  it sleeps inside a reduction of DeepSpeed
        memory     no process can get memory any more: its address space is limited to what it has
        nothing
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiphys.launch import run, train
from tiphys.launch.attendance import taken
from tiphys.pretrain import phases

STEP = 25
phases.SHORTEST = 6.0
number = int(taken(sys.argv)[1].partition(":")[0] or 1)
faults = os.environ["FAULTS"].split(",")
fault = faults[min(number, len(faults)) - 1]


def sleeping(original: Callable[..., Any], control: Any) -> Callable[..., Any]:
    """`all_reduce` that sleeps for ever if it is of the kind that FAULTS names."""

    def all_reduce(*args: Any, **options: Any) -> Any:
        if (options.get("group") is control) == (fault == "exchange"):
            time.sleep(10**6)
        return original(*args, **options)

    return all_reduce


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def on_step(self: Any, trainer: Any, metrics: Any) -> None:
    import torch.distributed as dist

    self.attendance.step = trainer.step
    if trainer.step == STEP and fault in ("exchange", "reduction"):
        dist.all_reduce = sleeping(dist.all_reduce, trainer.world.control)
    if trainer.step == STEP and fault == "memory":
        limit_memory()


if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1 and fault != "nothing":
    run.Attending.on_step = on_step  # type: ignore[method-assign]
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
