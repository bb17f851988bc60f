"""What each step of a loader cost, and how that compares with the best possible."""

from __future__ import annotations

import mmap
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiphys.dataio.cache import RangeCache
    from tiphys.dataio.loading.fetch import Fetcher
    from tiphys.dataio.sampling import PlannedWindows


class Counters:
    """The counters of each step: differences between the totals after it and before it."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._totals: dict[str, float] = {}
        self._cache: RangeCache | None = None  # the cache that counted these totals
        self._hit_rate = 0.0
        self._episodes: deque[tuple[int, int]] = deque(maxlen=256)

    def step(self, planned: PlannedWindows, cache: RangeCache) -> dict[str, float]:
        """The counters of the step that has just been made. Sums, except names that end in _rate or _bound."""
        statistics = cache.statistics()
        traffic = [store.traffic for store in self._fetcher.stores]
        totals: dict[str, float] = {
            "bytes_memory": statistics["bytes"] - statistics["missed_bytes"] - statistics["disk_bytes"],
            "bytes_disk": statistics["disk_bytes"],
            "bytes_missed": statistics["missed_bytes"],
            "bytes_store": sum(t.bytes for t in traffic),
            "bytes_peer": self._fetcher.peer_bytes,
            "requests": sum(t.requests for t in traffic),
            "retries": sum(t.retries for t in traffic),
            "throttled": sum(t.throttled for t in traffic),
            "cpu_seconds": time.process_time(),
        }
        if cache is not self._cache:  # a new cache counts from 0
            self._totals |= dict.fromkeys(("bytes_memory", "bytes_disk", "bytes_missed"), 0.0)
            self._cache = cache
        step = {name: float(total - self._totals.get(name, 0.0)) for name, total in totals.items()}
        self._totals = totals
        served = step["bytes_memory"] + step["bytes_disk"]
        if asked := served + step["bytes_missed"]:  # 0 in the last steps: blocks are opened ahead of their steps
            self._hit_rate = served / asked
        self._episodes.extend(zip(planned.entry.tolist(), planned.episode.tolist(), strict=True))
        return {
            **step,
            "cache_hit_rate": self._hit_rate,
            "cache_hit_bound": float(statistics["bound"]),
            "cache_bytes": float(cache.occupied),
            "look_ahead_steps": float(statistics["look_ahead"]),
            "resident_bytes": float(_resident()),
            "distinct_rate": self._distinct(),
        }

    def _distinct(self) -> float:
        """Distinct episodes among the last 256 windows, as a share of these windows: how random the stream is."""
        drawn = len(self._episodes)
        return len(set(self._episodes)) / drawn if drawn else 1.0


def _resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
