"""Blocking calls for event loops. A future of obstore costs Python twice as much CPU time as a blocking call in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tiphys.dataio.stores.backend import Transient

T = TypeVar("T")


class Threads:
    """A pool that starts a thread if all are busy. The threads are daemons, so a process can end without waiting for them."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def call(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """A future of what the function returns or raises. Cancelling the future does not interrupt the call."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put((function, arguments, loop, future))
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._work, name="tiphys-request", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            function, arguments, loop, future = self._calls.get()
            result, error = None, None
            try:
                result = function(*arguments)
            except Exception as caught:
                error = caught
            self._idle.release()  # before the result, otherwise the loop would start a new thread for the next call
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits for the result
                loop.call_soon_threadsafe(_settle, future, result, error)
            del function, arguments, loop, future, result, error  # an idle thread must not keep them in memory


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


_threads = Threads()


def call(function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """`Threads.call` in the pool of this process."""
    return _threads.call(function, *arguments)


_SLOWEST = 64 << 10  # bytes a second; a body that arrives more slowly is requested again


def patience(size: int, timeout: float) -> float:
    """Most seconds for an answer of so many bytes. A client's timeout does not notice a body that arrives byte by byte."""
    return 3 * timeout + size / _SLOWEST


async def by(ends: float, answer: Any) -> Any:
    """The result of a future; raises Transient if it is not there at the time `ends` of the event loop.

    A result that has arrived is never discarded, even if the event loop notices it late.
    """
    timer = asyncio.get_running_loop().call_at(ends, answer.cancel)
    try:
        return await answer
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Transient("the answer came too slowly") from None
    finally:
        timer.cancel()


def _renew() -> None:
    global _threads
    _threads = Threads()  # a forked child inherits the object, but not its threads


os.register_at_fork(after_in_child=_renew)
