"""From missing units to bytes: ranges of one object are asked for together, and many objects are asked for at a time."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.loading.units import UnitMap
from tiphys.dataio.messages import logger
from tiphys.dataio.peers import Peers
from tiphys.dataio.storage import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer


log = logger(__name__)
_OTHER_FILES = 32  # files that a loader process may have to open beside its connections


class Fetcher:
    """Reads units from the stores of a UnitMap's datasets, or from peers that may have them.

    requests, timeout, attempts  as in LoaderSettings
    """

    def __init__(self, units: UnitMap, requests: int, timeout: float = 10.0, attempts: int = 8):
        self.units = units
        self._peers: Peers | None = None
        self._owner: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
        self._usual = 0.1  # seconds that the store usually takes for a step's misses
        requests = _affordable(requests, len(units.datasets))
        self.stores = [
            Store(index.url, requests=requests, timeout=timeout, attempts=attempts) for index in units.datasets
        ]

    async def fetch(
        self, units: np.ndarray, put: Callable[[int, Buffer], None], *, peers: bool = True
    ) -> dict[int, Exception]:
        """Hand over each unit's bytes through `put`. Returns an error for each unit that is not there (any more).

        Raises errors that another draw would not help against: a store that cannot be reached, refused access, a replaced
        object.
        """
        if peers and self._peers is not None:
            units = await self._ask_peers(units, put)
        where = self.units.ranges(units)
        order = np.lexsort((where.offset, where.shard, where.dataset))
        new = np.flatnonzero(np.diff(where.dataset[order]) | np.diff(where.shard[order])) + 1
        failed: dict[int, Exception] = {}

        async def one(group: np.ndarray) -> None:
            dataset, shard = int(where.dataset[group[0]]), int(where.shard[group[0]])
            store, about = self.stores[dataset], self.units.datasets[dataset].shards[shard]
            numbers, starts, sizes = (a[group].tolist() for a in (units, where.offset, where.size))
            try:
                store.expect(about.name, about.etag)
                buffers: Sequence[Any] = await store.read_ranges_async(about.name, starts, sizes, about.size)
            except (FileNotFoundError, DataError) as error:
                failed.update(dict.fromkeys(numbers, error))
                return
            for unit, data in zip(numbers, buffers, strict=True):
                put(unit, data)

        if len(units):
            asked = time.monotonic()
            await asyncio.gather(*(one(group) for group in np.split(order, new)))
            if not failed:
                self._usual += 0.1 * (time.monotonic() - asked - self._usual)
        return failed

    async def check_unchanged(self, units: np.ndarray) -> None:
        """Raises ObjectChanged if a shard of these units is no longer the object that was first read."""
        where = self.units.ranges(units)
        for dataset, shard in {*zip(where.dataset.tolist(), where.shard.tolist())}:
            await self.stores[dataset].check_unchanged(self.units.datasets[dataset].shard_name(shard))

    def connect(self, peers: Peers, owner: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        """Ask these peers before the store.

        owner  (datasets, episodes) -> number of the peer that may have each episode; −1: none
        """
        if self._peers is not None:
            self._peers.close()
        self._peers, self._owner = peers, owner

    @property
    def peer_bytes(self) -> int:
        """Bytes received from peers so far."""
        return self._peers.bytes if self._peers is not None else 0

    async def _ask_peers(self, units: np.ndarray, put: Callable[[int, Buffer], None]) -> np.ndarray:
        """Put the units that peers have; return the others. Peers get as much time as the store usually takes, not more."""
        peers, owner = self._peers, self._owner
        assert peers is not None
        assert owner is not None
        process, sizes, found = owner(*self.units.episodes(units)), self.units.sizes(units), dict[int, Any]()

        async def one(number: int) -> None:
            here = process == number
            found.update(await peers.read(number, units[here].tolist(), sizes[here].tolist(), max(self._usual, 0.02)))

        asked = [p for p in np.unique(process).tolist() if p >= 0 and peers.alive(p)]
        await asyncio.gather(*(one(number) for number in asked))
        for unit, data in found.items():
            put(unit, data)
        return units[~np.isin(units, list(found))] if found else units


def _affordable(requests: int, stores: int) -> int:
    """Requests in flight to each store. Raises this process's limit of open files; if that is not enough, fewer than asked."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")) + _OTHER_FILES
    wanted = taken + stores * requests
    if soft < wanted and soft != resource.RLIM_INFINITY:
        soft = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return requests
    fewer = max(1, (soft - taken) // stores)
    log.warning(
        "this process may open only %d files (ulimit -n): %d requests in flight instead of %d", soft, fewer, requests
    )
    return fewer
