"""The inference thread of a policy server: it collects the requests of all clients and answers them together."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from tiphys.pretrain.serving.sessions import Observed, Session, Sessions

_LIVELY = 1.0  # seconds after a request in which the session's next one is waited for


@dataclass(frozen=True)
class _Job:
    work: Observed | Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def done(self, result: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self._settle, result)

    def _settle(self, result: Any) -> None:
        if self.future.done():  # the connection is gone
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Inference:
    """All forward passes of a server, in one thread.

    Parameters
    ----------
    sessions : Sessions
        The histories. Only this thread uses them.
    batch : int
        Most requests of a forward pass.
    wait : float
        Longest time, in seconds, that a request waits for those of other sessions. It does not wait if every session that asked
        within the last second has asked again.
    """

    def __init__(self, sessions: Sessions, batch: int, wait: float) -> None:
        self._sessions, self._batch, self._wait = sessions, batch, wait
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._asked: dict[int, float] = {}  # id of a session -> time of its last request
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def __enter__(self) -> Inference:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._thread.join()

    async def act(self, request: Observed) -> Any:
        """The `Acted` of a request. Raises what refused it."""
        return await self._answer(request)

    async def call(self, work: Callable[[], Any]) -> Any:
        """Do something with the sessions, between two forward passes."""
        return await self._answer(work)

    def end(self, session: Session) -> None:
        """Free a session's place, as soon as this thread is idle."""
        loop = asyncio.get_running_loop()
        self._queue.put(_Job(lambda: self._ended(session), loop, loop.create_future()))

    def _ended(self, session: Session) -> None:
        self._asked.pop(id(session), None)
        self._sessions.end(session)

    async def _answer(self, work: Observed | Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        self._queue.put(job)
        return await job.future

    def _run(self) -> None:
        while (jobs := self._collected()) is not None:
            if jobs:
                works = [job.work for job in jobs]
                answers = self._sessions.act([work for work in works if isinstance(work, Observed)])
                for job, answer in zip(jobs, answers, strict=True):
                    job.done(answer)

    def _collected(self) -> list[_Job] | None:
        """The requests of a forward pass; None: the server ends. Other work is done when it is met."""
        requests: list[_Job] = []
        until: float | None = None
        while len(requests) < self._batch:
            try:
                job = self._queue.get(timeout=None if until is None else max(until - monotonic(), 0.0))
            except queue.Empty:
                break
            if job is None:
                return None
            if not isinstance(job.work, Observed):
                self._do(job)
                continue
            now = monotonic()
            requests.append(job)
            self._asked[id(job.work.session)] = now
            until = now + self._wait if until is None else until
            if self._queue.empty() and len(requests) >= sum(now - asked < _LIVELY for asked in self._asked.values()):
                break
        return requests

    @staticmethod
    def _do(job: _Job) -> None:
        try:
            job.done(job.work())  # type: ignore[operator]
        except Exception as error:
            job.done(error)
