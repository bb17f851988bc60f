"""The sampling plan and the loaders' arguments of a recipe, for training, `tiphys tokens` and `tiphys check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tiphys.dataio.messages import counted
from tiphys.launch.mixture import names
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sizes import parse_size

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.loader import CacheBudget, Joined, LoaderSettings, MakeBatch
    from tiphys.dataio.plan.entries import PlanEntry
    from tiphys.dataio.sampling import SamplingPlan
    from tiphys.pretrain.balance import Balance
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.tokens.batch import TokenBatch

MAPPED = 200_000  # plans of more episodes are sorted once on each machine and mapped into memory


def open_datasets(recipe: Recipe, world: ParallelDims | None = None) -> list[EpisodeIndex]:
    """The index of each mixture entry. Local rank 0 makes and decodes new indexes first; the other ranks find them decoded."""
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.inplace.prepare import prepare

    opened: dict[str, EpisodeIndex] = {}

    def open_all() -> None:
        for entry in recipe.data.mixture:
            if entry.dataset not in opened:
                if world is not None and world.local == 0:
                    prepare(entry.dataset)
                opened[entry.dataset] = EpisodeIndex.open(entry.dataset)

    if world is None or world.local == 0:
        open_all()
    if world is not None:
        world.barrier()
        open_all()
    return [opened[entry.dataset] for entry in recipe.data.mixture]


class Joining:
    """Opens datasets that join the mixture of a run by `dataset` events of the plan's log."""

    def __init__(self, recipe: Recipe, objectives: Objectives) -> None:
        self.recipe, self.objectives = recipe, objectives
        # Name of each joined entry -> its dataset, and the number of the entry whose objective it gets
        self._known: dict[str, tuple[EpisodeIndex, int]] = {}

    def open(self, event: Mapping[str, Any]) -> PlanEntry:
        """The plan entry of an event. Raises DataError if the objective of the entry that it names does not fit its dataset."""
        from tiphys.dataio.index import EpisodeIndex

        known = names(self.recipe)
        like = known.index(event["like"]) if event["like"] in known else self._known[event["like"]][1]
        index = EpisodeIndex.open(event["dataset"])
        self._known[event["entry"]] = index, like
        objectives = self.objectives.joined([(index, like)])
        number = len(known)
        return _plan_entry(objectives, number, index, event["weight"], event["entry"], None)

    def loader(self, entries: Sequence[PlanEntry], *, training: bool = True) -> Joined:
        """What a loader must know of the given entries, which have joined."""
        from tiphys.dataio.loader import Joined

        objectives = self.objectives.joined([self._known[entry.name] for entry in entries])
        numbers = range(len(self.recipe.data.mixture), len(self.recipe.data.mixture) + len(entries))
        return Joined(
            needs=[objectives.needs(i) for i in numbers],
            tasks=[objectives.task_numbers(i) for i in numbers],
            make_batch=_make_batch(self.recipe, objectives, training),
        )


def _plan_entry(
    objectives: Objectives,
    number: int,
    index: EpisodeIndex,
    weight: float,
    name: str,
    priority: Any,
    known_as: str = "",
) -> PlanEntry:
    from tiphys.dataio.sampling import PlanEntry

    tasks = [t for t, n in enumerate(objectives.task_numbers(number).tolist()) if n >= 0]
    return PlanEntry(
        index=index,
        lengths=objectives.lengths(number),
        weight=weight,
        name=name,
        tasks=tasks,
        priority=priority,
        known_as=known_as,
    )


def make_plan(
    recipe: Recipe,
    indexes: list[EpisodeIndex],
    objectives: Objectives,
    *,
    held_out: bool = False,
    rows: int = 0,
    joining: Joining | None = None,
    known_as: Sequence[str] = (),
) -> SamplingPlan:
    """The plan of a recipe; if `held_out`, over the held-out episodes.

    rows      rows of a step; 0: as the recipe says
    known_as  the fingerprints that the datasets had when the run began; empty: those that they have
    """
    from tiphys.dataio.format.document import cache_folder
    from tiphys.dataio.plan.preferences import preference
    from tiphys.dataio.sampling import SamplingPlan

    entries, leave_out = [], recipe.data.on_bad_value == "quarantine"
    for i, (entry, index, name) in enumerate(zip(recipe.data.mixture, indexes, names(recipe), strict=True)):
        priority = None if held_out else preference(index, entry.prefer, entry.top, entry.top_of, leave_out=leave_out)
        was = known_as[i] if known_as else ""
        entries.append(_plan_entry(objectives, i, index, entry.weight, name, priority, was))
    return SamplingPlan(
        entries,
        rows=rows or int(recipe.deepspeed["train_batch_size"]),
        budget=objectives.length,
        seed=recipe.train.seed,
        weight_unit=recipe.data.weight_unit,
        starts=recipe.data.starts,
        replacement=recipe.data.replacement or held_out,
        buckets=recipe.data.buckets,
        validation=recipe.data.validation,
        held_out=held_out,
        # A large plan is sorted once on each machine, and every process maps it into memory. Every process sorts a small plan by
        # itself, because that takes less time than reading a file.
        cache_dir=str(cache_folder() / "plans") if sum(index.episodes for index in indexes) > MAPPED else "",
        open_entry=None if joining is None else joining.open,
    )


def step_rate_lines(plan: SamplingPlan) -> list[str]:
    """Lines of text: the tasks whose steps are not equally likely, or, if there are none, one line that says so."""
    lines = []
    for entry, tasks in zip(plan.entries, plan.describe()["step_rates"].values(), strict=True):
        for task, (low, high) in tasks.items():
            if high - low > 0.01:
                name = entry.index.tasks[task].name
                lines.append(
                    f"{name} (entry {entry.name}): its steps are drawn {low:.2f} to {high:.2f} times as often as its average step"
                )
    return lines or ["sampling: every step of a task is drawn equally often"]


def held_out_lines(recipe: Recipe, indexes: Sequence[EpisodeIndex]) -> list[str]:
    """A line of text if `data.validation` wants episodes held out and none is: then there is no held-out loss."""
    share = recipe.data.validation
    if not share or any(index.held_out(share).any() for index in indexes):
        return []
    episodes = sum({index.fingerprint: index.episodes for index in indexes}.values())
    return [
        f"no episode is held out, so there is no held-out loss: data.validation is {share:g} of {counted(episodes, 'episode')}; "
        "a larger share holds some out"
    ]


def window_lines(recipe: Recipe, objectives: Objectives) -> list[str]:
    """A line of text for each task whose windows have fewer steps than its objective's `window`, because of the context."""
    found: dict[str, None] = {}
    for entry, by_task in zip(recipe.data.mixture, objectives.layouts, strict=True):
        wanted = recipe.objectives[entry.objective].window if entry.objective in recipe.objectives else 0
        for layout in by_task.values():
            most = layout.steps(0, objectives.length) if layout.width else wanted
            if most < wanted:
                found[
                    f"objective {entry.objective!r}: at most {counted(most, 'step')} of task {layout.task!r} fit `context: "
                    f"{layout.context}`, so windows are shorter than `window: {wanted}`; raise `context`"
                ] = None
    return list(found)


def uncounted_texts(objectives: Objectives) -> list[tuple[str, EpisodeIndex]]:
    """(field, dataset) of each text that changes from step to step and whose tokens nobody has counted."""
    from tiphys.dataio import step_counts

    found: dict[tuple[str, str], EpisodeIndex] = {}
    for entry in range(len(objectives.layouts)):
        index = objectives.index(entry)
        for field in objectives.step_texts(entry):
            if not step_counts.are_there(index, field, objectives.text.definition):
                found[field, index.url] = index
    return [(field, index) for (field, _), index in found.items()]


def text_lines(objectives: Objectives) -> list[str]:
    """Lines of text: the texts of steps that the plan counts with their most tokens, because their real number is not known."""
    return [
        f"{index.url}: every text of the field {field!r} is planned with its most tokens, so rows are less full than they "
        "could be; `tiphys dataset lengths RECIPE` counts the tokens once"
        for field, index in uncounted_texts(objectives)
    ]


def video_lines(plan: SamplingPlan, objectives: Objectives) -> list[str]:
    """Lines of text: the videos of which far more pictures are decoded than the plan's windows want."""
    from tiphys.dataio.inplace.summary import warnings

    found: dict[str, None] = {}
    planned = plan.windows(0)
    for number, entry in enumerate(plan.entries):
        units = planned.units[planned.entry == number]
        if len(units) and entry.index.packet_fields:
            found |= dict.fromkeys(warnings(entry.index, objectives.needs(number).fields, round(float(units.mean()))))
    return list(found)


def notes(recipe: Recipe, indexes: Sequence[EpisodeIndex], objectives: Objectives, plan: SamplingPlan) -> list[str]:
    """Lines of text that `tiphys check` prints about a valid recipe."""
    return [
        *step_rate_lines(plan),
        *held_out_lines(recipe, indexes),
        *window_lines(recipe, objectives),
        *text_lines(objectives),
        *video_lines(plan, objectives),
    ]


def loader_settings(recipe: Recipe, cache: CacheBudget | None = None) -> LoaderSettings:
    """The settings of a recipe's loaders. `cache`: what one loader may cache; None: the default."""
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
    """The arguments of TrajectoryLoader that all loaders of a recipe share. `cache`: as in `loader_settings`."""
    entries = range(len(recipe.data.mixture))
    return {
        "make_batch": _make_batch(recipe, objectives, training),
        "needs": [objectives.needs(i) for i in entries],
        "tasks": [objectives.task_numbers(i) for i in entries],
        "settings": loader_settings(recipe, cache),
    }


def _make_batch(recipe: Recipe, objectives: Objectives, training: bool) -> MakeBatch:
    return partial(
        objectives.make_batch, seed=recipe.train.seed, training=training, on_bad_value=recipe.data.on_bad_value
    )


def balance_of(recipe: Recipe, objectives: Objectives) -> Balance:
    """The balance of the mixture's lines. Raises DataError if lines that share tasks disagree whether weights are chosen."""
    from tiphys.pretrain.balance import Balance

    return Balance.of(recipe, names(recipe), [list(layouts) for layouts in objectives.layouts], len(objectives.tasks))


VALIDATIONS = 10  # of a run, if the recipe does not say when
_VALIDATION_ROWS = 64
_VALIDATION_SHARE = 0.05  # of the rows that are trained between two validations; a validation has no backward pass


def validation_every(recipe: Recipe) -> int:
    """Training steps between two validations; 0: only at the end."""
    every = recipe.validate.every
    return max(1, recipe.train.steps // VALIDATIONS) if every == 0 else max(every, 0)


def validation_rows(recipe: Recipe) -> int:
    """Rows of one validation, in all ranks together."""
    if recipe.validate.rows:
        return recipe.validate.rows
    trained = int(recipe.deepspeed["train_batch_size"]) * (validation_every(recipe) or recipe.train.steps)
    return min(_VALIDATION_ROWS, max(8, int(_VALIDATION_SHARE * trained)))


def held_out_batches(
    recipe: Recipe, indexes: list[EpisodeIndex], objectives: Objectives, world: ParallelDims
) -> Iterator[TokenBatch]:
    """This rank's share of the held-out rows. Every validation uses the same rows."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.pretrain.tokens.batch import TokenBatch

    if not world.is_first_stage:
        return
    plan = make_plan(recipe, indexes, objectives, held_out=True, rows=validation_rows(recipe))
    with TrajectoryLoader(plan, world.home, **loader_arguments(recipe, objectives, training=False), stop=1) as loader:
        for loaded in loader:
            copies = {name: array.copy() for name, array in loaded.arrays.items()}
            loaded.release()
            yield TokenBatch.from_arrays(copies)
