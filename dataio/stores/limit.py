"""RequestLimit: how many requests to a store may be in flight, fewer after each refusal."""

from __future__ import annotations

import asyncio
import collections
import time


class RequestLimit:
    """How many requests may be in flight: additive increase, multiplicative decrease (Chiu and Jain 1989)."""

    def __init__(self, most: int):
        self.most, self.now, self.flying = most, float(most), 0
        self.waiting: collections.deque[tuple[asyncio.Future[None], int]] = collections.deque()
        self.shrunk = 0.0

    async def acquire(self, requests: int = 1) -> None:
        """Wait until so many more may fly; those that came first go first."""
        if not self.waiting and self._room(requests):
            self.flying += requests
            return
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append((turn, requests))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(requests)
            raise

    def _room(self, requests: int) -> bool:
        return self.flying == 0 or self.flying + requests <= int(self.now)

    def release(self, requests: int = 1) -> None:
        self.flying -= requests
        while self.waiting and self._room(self.waiting[0][1]):
            turn, more = self.waiting.popleft()
            if not turn.done():
                self.flying += more
                turn.set_result(None)

    def shrink(self) -> None:
        now = time.monotonic()
        if now - self.shrunk > 0.2:  # one wave of refusals is one piece of news
            self.now, self.shrunk = max(1.0, self.now / 2), now

    def grow(self) -> None:
        self.now = min(float(self.most), self.now + 1 / self.now)
