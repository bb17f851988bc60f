"""The keys that `parallel.auto` fills if a recipe sets them to `auto`."""

from __future__ import annotations

import copy
from typing import Any

KEYS = {  # short name -> key
    "pipeline": "parallel.pipeline",
    "expert": "parallel.expert",
    "zero_stage": "deepspeed.zero_optimization.stage",
    "micro_batch": "deepspeed.train_micro_batch_size_per_gpu",
    "checkpointing": "model.checkpointing",
}
# What is checked as long as nobody knows the number of processes.
_UNTIL_THEN: dict[str, Any] = {"pipeline": 1, "expert": 1, "zero_stage": 1, "checkpointing": False}


def open_keys(raw: Any) -> list[str]:
    """Short names of the keys that are to be filled."""
    if not isinstance(raw, dict) or _at(raw, ["parallel", "auto"]) is not True:
        return []
    return [name for name, key in KEYS.items() if _at(raw, key.split(".")) == "auto"]


def with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe, with a valid value for each key that is still to be filled."""
    names = open_keys(raw)
    if not names:
        return raw
    out = copy.deepcopy(raw)
    for name in names:
        *path, last = KEYS[name].split(".")
        section = _at(out, path)
        if name in _UNTIL_THEN:
            section[last] = _UNTIL_THEN[name]
        else:
            del section[last]
    return out


def _at(node: Any, path: list[str]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node
