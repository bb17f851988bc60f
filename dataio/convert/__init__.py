"""Other formats -> datasets. `convert` is the way in; one file a format; docs/converting.md is the user's page."""

from __future__ import annotations

from typing import Any

__all__ = ["ConversionReport", "convert"]


def __getattr__(name: str) -> Any:  # the reader processes import this package, and need no writer
    if name in __all__:
        from tiphys.dataio.convert import pieces

        return getattr(pieces, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
