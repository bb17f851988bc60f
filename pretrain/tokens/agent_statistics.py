"""Statistics of fields that hold a value of each agent, as statistics of one agent. Only training needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tiphys.dataio.statistics import FieldStatistics, pooled


def statistics_of_one_agent(
    found: Mapping[str, FieldStatistics], names: tuple[str, ...], agents: int
) -> dict[str, FieldStatistics]:
    """Statistics of all fields, those of `names` over all agents."""
    out = dict(found)
    for name in set(names) & set(found):
        one, parts = found[name], []
        if np.ndim(one.mean) == 0:  # it is pooled over all entries
            continue
        size = int(np.prod(np.shape(one.mean)[1:], dtype=np.int64))
        for agent in range(agents):
            cells = None if one.histogram is None else one.histogram.part(agent * size, (agent + 1) * size)
            arrays: dict[str, Any] = {key: getattr(one, key)[agent] for key in ("mean", "std", "min", "max")}
            parts.append(replace(one, **arrays, quantiles=one.quantiles[:, agent], histogram=cells))
        # What is counted by step and episode stays as it is
        counted = {key: getattr(one, key) for key in ("invalid", "beyond", "bad_episodes", "first_bad")}
        out[name] = replace(pooled(parts), **counted)
    return out
