"""Worker processes that compute jobs: spawned, deaf to Ctrl-C, and without the current folder on their path."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class ProcessPool(ProcessPoolExecutor):
    """An executor of spawned processes. Each calls `start(*arguments)` first. Only the parent hears Ctrl-C."""

    def __init__(self, processes: int, start: Callable[..., object], arguments: tuple[Any, ...] = ()) -> None:
        with _safe_path():  # locks of the executor start a process of `multiprocessing`
            spawn = multiprocessing.get_context("spawn")
            super().__init__(processes, mp_context=spawn, initializer=_begin, initargs=(start, arguments))

    def submit(self, job: Callable[..., T], /, *arguments: Any, **options: Any) -> Future[T]:
        with _safe_path():  # the processes start with the first job
            return super().submit(job, *arguments, **options)

    def kill(self) -> None:
        """End all processes at once. Jobs that run are lost."""
        for process in list((self._processes or {}).values()):
            process.kill()


def _begin(start: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start(*arguments)


@contextmanager
def _safe_path() -> Iterator[None]:
    """`multiprocessing` takes no environment for its processes, so this process' own is changed for a moment."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
