"""Which keys of a recipe may change between a checkpoint and its continuation: those that do not decide what is learned.

Keys of Tiphys say so in `schema.py` (`resume=True`). `deepspeed:` has no schema here, so its free keys are the list below.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache

from tiphys.recipes.keys import leaves
from tiphys.recipes.schema import Recipe

# Patterns of `fnmatch`.
DEEPSPEED = (
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.gradient_accumulation_steps",
    "deepspeed.zero_optimization",
    "deepspeed.zero_optimization.*",
    "deepspeed.pipeline*",
    "deepspeed.optimizer.params.torch_adam",
    "deepspeed.scheduler.params.total_num_steps",
    "deepspeed.steps_per_print",
    "deepspeed.dump_state",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.memory_breakdown",
    "deepspeed.comms_logger*",
    "deepspeed.flops_profiler*",
    "deepspeed.tensorboard*",
    "deepspeed.wandb*",
    "deepspeed.csv_monitor*",
)

_INDEX = re.compile(r"\[(\d+|\*)\]")


@cache
def patterns() -> tuple[str, ...]:
    """Patterns of the keys that may change, without list indices."""
    free = (_INDEX.sub("", leaf.path) for leaf in leaves(Recipe) if leaf.key.resume)
    return (*free, *DEEPSPEED)


def may_change(path: str) -> bool:
    """Whether a resumed run may have another value at this key path, such as `train.steps` or `evaluate.tasks[0]`."""
    plain = _INDEX.sub("", path)
    return any(fnmatchcase(plain, pattern) for pattern in patterns())
