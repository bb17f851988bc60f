"""`RequestLimit`: how many requests to a store may be in flight at once. After a refusal the limit is halved."""

from __future__ import annotations

import asyncio
import collections
import time


class RequestLimit:
    """A limit of requests in flight, with additive increase and multiplicative decrease (Chiu and Jain 1989).

    Belongs to one event loop. `most` is the highest limit, `now` the present one, `flying` the number of requests in flight.
    """

    def __init__(self, most: int):
        self.most, self.now, self.flying = most, float(most), 0
        self.waiting: collections.deque[tuple[asyncio.Future[None], int]] = collections.deque()
        self.shrunk = 0.0

    async def acquire(self, requests: int = 1) -> None:
        """Wait until so many more requests may be sent. Callers are served in order."""
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
        """So many requests have ended."""
        self.flying -= requests
        while self.waiting and self._room(self.waiting[0][1]):
            turn, more = self.waiting.popleft()
            if not turn.done():
                self.flying += more
                turn.set_result(None)

    def shrink(self) -> None:
        """Halve the limit after a refusal."""
        now = time.monotonic()
        if now - self.shrunk > 0.2:  # refusals that come together count once
            self.now, self.shrunk = max(1.0, self.now / 2), now

    def grow(self) -> None:
        """Raise the limit after a success: by 1 after about `now` successes."""
        self.now = min(float(self.most), self.now + 1 / self.now)
