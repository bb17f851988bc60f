"""Conversion of other formats into datasets. `convert` is the entry point. Each format has one file.

docs/converting.md is the user's page.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ConversionReport", "convert"]


def __getattr__(name: str) -> Any:  # lazy: reader processes import this package but need no writer
    if name in __all__:
        from tiphys.dataio.convert import pieces

        return getattr(pieces, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
