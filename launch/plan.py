"""A recipe's sampling plan and its loaders' arguments, for training, `tiphys tokens` and `tiphys check`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tiphys.launch.mixture import names
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sizes import parse_size

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.loader import CacheBudget, LoaderSettings
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.tokens.batch import TokenBatch

MAPPED = 200_000  # episodes above which a plan is sorted once on each machine and mapped into memory


def open_datasets(recipe: Recipe, world: ParallelDims | None = None) -> list[EpisodeIndex]:
    """The index of each mixture entry. The first rank of a machine decodes new indexes; the other ranks find them decoded."""
    from tiphys.dataio.index import EpisodeIndex

    opened: dict[str, EpisodeIndex] = {}

    def open_all() -> None:
        for entry in recipe.data.mixture:
            if entry.dataset not in opened:
                opened[entry.dataset] = EpisodeIndex.open(entry.dataset)

    if world is None or world.local == 0:
        open_all()
    if world is not None:
        world.barrier()
        open_all()
    return [opened[entry.dataset] for entry in recipe.data.mixture]


def make_plan(
    recipe: Recipe, indexes: list[EpisodeIndex], objectives: Objectives, *, held_out: bool = False, rows: int = 0
) -> SamplingPlan:
    """The plan of a recipe. With `held_out`, of the held-out episodes, with `rows` rows in a step."""
    from tiphys.dataio.format.document import cache_folder
    from tiphys.dataio.plan.preferences import preference
    from tiphys.dataio.sampling import PlanEntry, SamplingPlan

    entries = []
    for i, (entry, index) in enumerate(zip(recipe.data.mixture, indexes, strict=True)):
        numbers = objectives.task_numbers(i)
        entries.append(
            PlanEntry(
                index=index,
                lengths=objectives.lengths(i),
                weight=entry.weight,
                name=names(recipe)[i],
                tasks=[int(t) for t in range(len(index.tasks)) if numbers[t] >= 0],
                priority=None if held_out else preference(index, entry.prefer, entry.top),
            )
        )
    return SamplingPlan(
        entries,
        rows=rows or int(recipe.deepspeed["train_batch_size"]),
        budget=objectives.length,
        seed=recipe.train.seed,
        weight_unit=recipe.data.weight_unit,
        replacement=recipe.data.replacement or held_out,
        buckets=recipe.data.buckets,
        validation=recipe.data.validation,
        held_out=held_out,
        # A large plan is sorted once on each machine and mapped into memory by every process. A small one is sorted anew, which
        # is quicker than reading it.
        cache_dir=str(cache_folder() / "plans") if sum(index.episodes for index in indexes) > MAPPED else "",
    )


def loader_settings(recipe: Recipe, cache: CacheBudget | None = None) -> LoaderSettings:
    """The settings of this recipe's loaders. `cache`: what one loader may cache; None: the default."""
    from tiphys.dataio.loader import CacheBudget, LoaderSettings

    return LoaderSettings(
        cache=cache or CacheBudget(),
        requests=recipe.data.requests,
        timeout=recipe.data.timeout,
        attempts=recipe.data.attempts,
        prefetch=parse_size(recipe.data.prefetch),
        unit_rows=recipe.data.unit_rows,
    )


def loader_arguments(
    recipe: Recipe, objectives: Objectives, *, cache: CacheBudget | None = None, training: bool = True
) -> dict[str, Any]:
    """The arguments of TrajectoryLoader that every loader of this recipe gets. `cache`: as in `loader_settings`."""
    entries = range(len(recipe.data.mixture))
    return {
        "make_batch": partial(objectives.make_batch, seed=recipe.train.seed, training=training),
        "needs": [objectives.needs(i) for i in entries],
        "tasks": [objectives.task_numbers(i) for i in entries],
        "settings": loader_settings(recipe, cache),
    }


def held_out_batches(
    recipe: Recipe, indexes: list[EpisodeIndex], objectives: Objectives, world: ParallelDims
) -> Iterator[TokenBatch]:
    """This rank's share of `validate.rows` held-out rows; the same rows at every validation."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.pretrain.tokens.batch import TokenBatch

    if not world.is_first_stage:
        return
    plan = make_plan(recipe, indexes, objectives, held_out=True, rows=recipe.validate.rows)
    with TrajectoryLoader(plan, world.home, **loader_arguments(recipe, objectives, training=False), stop=1) as loader:
        for loaded in loader:
            copies = {name: array.copy() for name, array in loaded.arrays.items()}
            loaded.release()
            yield TokenBatch.from_arrays(copies)
