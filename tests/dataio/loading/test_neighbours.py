"""What a step misses on a hub is read with what follows it in its file, while the cache has unused room."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.dataio.inplace.made import NEEDS, batches, source
from tests.dataio.inplace.test_remote import HUB
from tests.dataio.signing_hub import SigningHub, hub_of
from tiphys.dataio.cache import RangeCache
from tiphys.dataio.inplace.build import index_lerobot
from tiphys.dataio.loader import CacheBudget
from tiphys.dataio.loading.fetch import Fetcher
from tiphys.dataio.loading.neighbours import Neighbours, on_hubs
from tiphys.dataio.loading.units import UnitMap


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("raw") / "robot")


def requests(hub: SigningHub) -> Counter[str]:
    return Counter(path for path, _ in hub.reads if path.endswith(".mp4"))


def test_few_requests_read_a_file_and_the_batches_are_the_same(robot: Path, tmp_path: Path) -> None:
    cache = CacheBudget(memory=4 << 20)  # too small for streaming
    with hub_of(robot) as hub:
        index = index_lerobot(HUB, str(tmp_path / "indexed"))
        hub.reads.clear()
        found = batches(index, stop=8, cache=cache)
        assert max(requests(hub).values()) <= 4
    local = index_lerobot(str(robot), str(tmp_path / "local"))
    assert batches(local, stop=8, cache=cache) == found


@pytest.mark.parametrize("memory", [1 << 22, 1 << 14])
def test_neighbours_take_unused_room_only_and_each_unit_arrives_once(memory: int, robot: Path, tmp_path: Path) -> None:
    async def fetched(index, hub: SigningHub) -> int:  # type: ignore[no-untyped-def]
        units = UnitMap([index], NEEDS, 2)
        everything = np.arange(units.units)
        cache = RangeCache(
            units.units,
            units.sizes,
            lambda step: everything[step::7],
            total=0,
            memory=memory,
            stop=7,
            staging=memory // 2,
        )
        fetcher = Fetcher(units, 8)
        neighbours = Neighbours(units, fetcher, cache, everything)
        hub.reads.clear()
        blocks = [cache.open(), cache.open()]
        await asyncio.gather(*(neighbours.fetch(block.misses, block.put) for block in blocks))
        for block in blocks:
            alone: dict[int, bytes] = {}
            await fetcher.fetch(block.units, alone.__setitem__)
            for unit in block.units.tolist():
                assert block.get(unit) == alone[unit]
            block.close()
        kept = int(cache.holds(everything).sum())
        cache.close()
        return kept

    with hub_of(robot) as hub:
        index = index_lerobot(HUB, str(tmp_path / "indexed"))
        assert on_hubs(UnitMap([index], NEEDS, 2))
        kept = asyncio.run(fetched(index, hub))
    units = UnitMap([index], NEEDS, 2).units
    assert (kept > units // 2) == (memory == 1 << 22)
