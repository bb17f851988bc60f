"""`launch/train.py` whose rank 1 fails in the third training step, for tests: failing_rank.py HOW RECIPE [key=value …]

HOW  killed   SIGKILL inside the backward pass, where rank 0 waits for it inside DeepSpeed
     refused  the user's error, between two steps
     crashed  an error inside Tiphys, between two steps
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.launch import run, train

how, *arguments = sys.argv[1:]
done = 0


def kill(self: Any, *_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_step(self: Any, trainer: Any, metrics: Any) -> None:
    self.attendance.step = step = trainer.step
    if step == 2 and how == "killed":
        type(trainer.engine.deepspeed).backward = kill  # type: ignore[method-assign]
    if step == 2 and how == "refused":
        raise DataError("episode 7 is damaged")
    if step == 2 and how == "crashed":
        raise AttributeError("no such thing")


if os.environ["RANK"] == "1":
    run.Attending.on_step = on_step  # type: ignore[method-assign]
sys.exit(train.main(arguments))
