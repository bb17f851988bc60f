"""Blocking calls for event loops. A future of obstore's costs Python twice the processor time of a call in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Threads:
    """As many threads as calls were ever under way at once. They are daemons: no process waits for them to end."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def call(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """What the function returns or raises. Whoever cancels the future leaves the call to itself."""
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
            self._idle.release()  # first, or the loop would begin a new thread for what comes next
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
                loop.call_soon_threadsafe(_settle, future, result, error)
            del function, arguments, loop, future, result, error  # nothing is held while there is nothing to do


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


_threads = Threads()


def call(function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """`Threads.call` of this process."""
    return _threads.call(function, *arguments)


def _renew() -> None:
    global _threads
    _threads = Threads()  # a forked child has the object but not its threads


os.register_at_fork(after_in_child=_renew)
