"""`Workers`: a pool of spawned processes that gives results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """A pool of processes. With `processes=1` the jobs run in this process.

    `start(*arguments)` is called once in each process, before its first job. Processes are spawned, because simulators and
    threads do not survive a fork. A context manager: leaving it ends the processes.
    """

    def __init__(self, processes: int, start: Callable[..., None], *arguments: Any) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=start, initargs=arguments)
        else:
            start(*arguments)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(self, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
        """The result of each job, in order. An exception of a job is raised here; RuntimeError if a process died."""
        if not self._pool:
            for job in jobs:
                yield job()
            return
        pending: deque[Future[T]] = deque()
        try:
            for job in jobs:
                pending.append(self._pool.submit(job))
                if len(pending) > 2 * self._processes:  # limits the results that wait in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that played episodes was killed (out of memory, a crash in a simulator's native code, or an "
                "error at its start, which is printed above); use fewer processes, or 1 process to see the error itself"
            ) from error
