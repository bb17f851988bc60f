"""Whether the experiment trackers of a recipe are installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from tiphys.recipes.schema import Recipe


def tracker_errors(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, reason) of each tracker that is not installed."""
    for number, name in enumerate(recipe.track.to):
        if find_spec(name) is None:
            yield f"track.to[{number}]", f"{name} is not installed; install it with: pip install 'tiphys[{name}]'"
