"""Keeps the scheduling of this process while a library starts its threads.

The AV1 encoder gives the thread that opens it, and its own threads, the highest real-time priority if the process may do so
(root). Every later thread and process inherits that, and nothing else runs beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_THREADS = Path("/proc/self/task")


def _real_time() -> set[int]:
    """Threads of this process that have a real-time priority. Empty where the system does not tell."""
    if not _THREADS.is_dir():
        return set()
    found = set()
    for name in os.listdir(_THREADS):
        try:
            if os.sched_getscheduler(int(name)) in (os.SCHED_FIFO, os.SCHED_RR):
                found.add(int(name))
        except ProcessLookupError:  # it has ended
            continue
    return found


@contextmanager
def kept() -> Iterator[None]:
    """Give every thread that has become real-time inside the `with` block the ordinary priority again."""
    before = _real_time()
    try:
        yield
    finally:
        for thread in _real_time() - before:
            try:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            except ProcessLookupError:
                continue
