"""Calls in threads: their results, their errors, and the number of threads."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from tiphys.dataio.stores import threads
from tiphys.dataio.stores.threads import Threads


def test_results_and_errors_reach_the_loop_that_called() -> None:
    def divide(a: int, b: int) -> float:
        time.sleep(0.01)
        return a / b

    async def ask() -> None:
        calls = Threads()
        assert await asyncio.gather(*(calls.call(divide, n, 2) for n in range(50))) == [n / 2 for n in range(50)]
        with pytest.raises(ZeroDivisionError):
            await calls.call(divide, 1, 0)

    for _ in range(2):
        asyncio.run(ask())


def test_there_are_no_more_threads_than_simultaneous_calls() -> None:
    seen = set[int]()

    def note() -> None:
        seen.add(threading.get_ident())
        time.sleep(0.002)

    async def ask() -> None:
        calls, room = Threads(), asyncio.Semaphore(4)

        async def one() -> None:
            async with room:
                await calls.call(note)

        await asyncio.gather(*(one() for _ in range(200)))

    asyncio.run(ask())
    assert len(seen) <= 4


def test_a_cancelled_call_blocks_no_other() -> None:
    async def ask() -> float:
        calls, stuck = Threads(), threading.Event()
        lost = calls.call(stuck.wait)
        lost.cancel()
        began = time.monotonic()
        await calls.call(time.sleep, 0)
        stuck.set()
        return time.monotonic() - began

    assert asyncio.run(ask()) < 5


def test_a_forked_child_has_its_own_threads() -> None:
    async def ask() -> int:
        return await asyncio.wait_for(threads.call(os.getpid), 20)

    assert asyncio.run(ask()) == os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if asyncio.run(ask()) == os.getpid() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
