"""No process of a run outlives what started it: Linux kills a child whose parent has ended, if the child has asked for it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
PARENT = "TIPHYS_PARENT"  # process number of the launcher, for its ranks


def die_with_parent(parent: int = 0) -> None:
    """From now on this process is killed when its parent ends. On systems other than Linux nothing happens.

    parent   process number of the expected parent; 0: the one that it has now. If it has ended already, this process ends too.
    """
    parent = parent or os.getppid()
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) and os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(128 + signal.SIGKILL)


@contextmanager
def adopted_orphans() -> Iterator[None]:
    """Inside the block, processes below this one whose parents end become its children, so that it can wait for them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _prctl(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0
