"""`Workers`: a pool of spawned processes that gives results in the order of the jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tiphys.dataio.errors import Explained
from tiphys.dataio.process_pool import ProcessPool

T = TypeVar("T")


class WorkerLost(Explained, RuntimeError):
    """A process that played episodes ended by itself."""


class Workers:
    """A pool of processes. With `processes=1` the jobs run in this process.

    `start(*arguments)` is called once in each process, before its first job. Processes are spawned, because simulators and
    threads do not survive a fork. A context manager: leaving it ends the processes.
    """

    def __init__(self, processes: int, start: Callable[..., None], *arguments: Any) -> None:
        self._processes = processes
        self._pool = ProcessPool(processes, start, arguments) if processes > 1 else None
        if self._pool is None:
            start(*arguments)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if self._pool:
            if kind is not None:  # a job that runs may take minutes
                self._pool.kill()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(self, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
        """The result of each job, in order. An exception of a job is raised here; WorkerLost if a process died."""
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
            raise WorkerLost(
                "a process that played episodes was killed (out of memory, a crash in a simulator's native code, or an "
                "error at its start, which is printed above); use fewer processes, or 1 process to see the error itself"
            ) from error
