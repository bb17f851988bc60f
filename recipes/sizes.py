"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

_UNITS = (
    {"": 1}
    | {k: 1000 ** (i + 1) for i, k in enumerate("kmgt")}
    | {f"{k}i": 1024 ** (i + 1) for i, k in enumerate("kmgt")}
)
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `8GiB` (8 · 2³⁰), `500MB` (5 · 10⁸) or `4096`. Raises ValueError for anything else."""
    found = _SIZE.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB, 8GiB, 2TB")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])
