"""From a recipe to its loaders' settings."""

from tiphys.dataio.loader import CacheBudget, LoaderSettings
from tiphys.launch.plan import loader_settings
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sections.data import Data


def test_the_recipe_decides_all_settings_of_its_loaders() -> None:
    data = Data(requests=3, timeout=4.0, attempts=5, prefetch="6MiB", unit_rows=7)
    cache = CacheBudget(memory=8 << 20)
    assert loader_settings(Recipe(data=data), cache) == LoaderSettings(
        cache=cache, requests=3, timeout=4.0, attempts=5, prefetch=6 << 20, unit_rows=7
    )


def test_the_recipes_defaults_are_those_of_the_loader() -> None:
    assert loader_settings(Recipe()) == LoaderSettings()
