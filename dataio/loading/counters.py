"""What each step of a loader cost, and how that compares with what is possible."""

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
    """Differences between the totals of one step and the next."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._totals: dict[str, float] = {}
        self._cache: RangeCache | None = None  # whose totals these are
        self._hit_rate = 0.0
        self._episodes: deque[tuple[int, int]] = deque(maxlen=256)

    def step(self, planned: PlannedWindows, cache: RangeCache) -> dict[str, float]:
        """Of the step that has just been made. Sums, but for names that end in _rate or _bound."""
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
        if cache is not self._cache:  # a new one has begun to count anew
            self._totals |= dict.fromkeys(("bytes_memory", "bytes_disk", "bytes_missed"), 0.0)
            self._cache = cache
        step = {name: float(total - self._totals.get(name, 0.0)) for name, total in totals.items()}
        self._totals = totals
        served = step["bytes_memory"] + step["bytes_disk"]
        if asked := served + step["bytes_missed"]:  # blocks open ahead of their steps: towards the end none is left
            self._hit_rate = served / asked
        self._episodes.extend(zip(planned.entry.tolist(), planned.episode.tolist(), strict=True))
        return {
            **step,
            "cache_hit_rate": self._hit_rate,
            "cache_hit_bound": float(statistics["bound"]),
            "cache_bytes": float(cache.kept.occupied),
            "look_ahead_steps": float(statistics["look_ahead"]),
            "resident_bytes": float(_resident()),
            "distinct_rate": self._distinct(),
        }

    def _distinct(self) -> float:
        """Distinct episodes among the last 256 windows, as a share of these: how random the stream is."""
        drawn = len(self._episodes)
        return len(set(self._episodes)) / drawn if drawn else 1.0


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
