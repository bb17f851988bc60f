"""What is wrong with where a recipe publishes."""

from __future__ import annotations

from collections.abc import Iterator

from tiphys.recipes.schema import Recipe
from tiphys.recipes.sizes import parse_size


def rate_errors(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, reason) if a limit would have no effect."""
    keys = recipe.publish
    if keys.to.startswith("hf://") and parse_size(keys.rate):
        yield (
            "publish.rate",
            f"a hub's client takes no limit, so {keys.rate} a second would not be kept; remove it, or publish to a bucket",
        )


def holder_errors(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, reason) if another run publishes at this place. A place that cannot be reached now may be there later."""
    from tiphys.dataio.episode import DataError
    from tiphys.launch.finish import published, takes_over
    from tiphys.pretrain.follow.chain import LATEST, FollowError, parse_pointer
    from tiphys.pretrain.follow.places import place_of
    from tiphys.pretrain.follow.writer import How, check_holder
    from tiphys.pretrain.hub_errors import FetchError

    keys, record = recipe.publish, published(recipe.run.dir)
    if not keys.to:
        return
    try:
        found = place_of(keys.to).pointer("")
        pointer = parse_pointer(found[0], f"{keys.to}/{LATEST}") if found else None
    except (FetchError, DataError, OSError):
        return
    try:
        check_holder(pointer, keys.to, How(run=record.run, take_over=takes_over(recipe, record)))
    except FollowError as error:
        yield "publish.to", str(error)
