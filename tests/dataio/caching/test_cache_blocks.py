"""RangeCache as the loader uses it: with several open blocks, which are opened before and after others are closed."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from tiphys.dataio.cache import Block, RangeCache


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("staging", [0, 9_000])
def test_every_open_block_has_all_its_units_even_if_others_are_closed_in_between(seed: int, staging: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.integers(20, 700, 400)
    blocks = [rng.integers(0, 400, 12) for _ in range(150)]
    data = [bytes([u % 256]) * int(n) for u, n in enumerate(size)]
    cache = RangeCache(
        400, lambda units: size[units], lambda block: blocks[block], total=int(size.sum()), memory=60_000,
        stop=150, staging=staging,
    )  # fmt: skip
    opened: deque[Block] = deque()
    done = 0
    while done < 150:
        while cache.can_open() and rng.random() < 0.8:  # looks at the next block, often long before it is opened
            block = cache.open()
            assert set(block.misses.tolist()) <= set(block.units.tolist()) == set(blocks[block.number].tolist())
            for unit in block.misses.tolist():
                block.put(unit, data[unit])
            opened.append(block)
        if opened:
            block = opened.popleft()
            for unit in block.units.tolist():
                assert block.get(unit) == data[unit]
            block.close()
            done += 1
        assert cache.occupied + cache.staged <= 60_000
    assert cache.statistics()["hit_rate"] > 0.2
