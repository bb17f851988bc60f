"""All errors of a recipe at once: schema, DeepSpeed's keys, objectives, layout, batch arithmetic, data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.launch.checks.deepspeed_keys import config_errors, key_errors
from tiphys.launch.checks.model import (
    EXPERT_SIZES,
    MODEL_SIZES,
    average_errors,
    batch_size_errors,
    freeze_errors,
    init_errors,
    model_errors,
    rope_errors,
    tokenizer_errors,
)
from tiphys.launch.checks.optimizer import optimizer_errors, scheduler_errors
from tiphys.launch.checks.publishing import holder_errors, rate_errors
from tiphys.launch.checks.trackers import tracker_errors
from tiphys.launch.devices import devices
from tiphys.pretrain.distributed.layout_errors import (
    batch_errors,
    expert_errors,
    grid_errors,
    section_errors,
    stage_errors,
    zero_errors,
)
from tiphys.recipes.keys import key_of, section_fields
from tiphys.recipes.load import Examined, RecipeError, examine, from_dict
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sections.model import Experts, Model
from tiphys.recipes.sections.objective import Objective
from tiphys.recipes.sections.training import Parallel, Train

if TYPE_CHECKING:
    from tiphys.launch.checks.opened import Opened

Where = Callable[[str], str]


def check(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    world: int = 0,
    data: bool = True,
    environments: bool = True,
    index: bool = False,
) -> Recipe:
    """The recipe, if nothing is wrong with it. Raises RecipeError with everything that is wrong.

    world   number of processes it is meant for; 0: unknown, so that only what fails on every number of processes is an error
    data    also open the datasets and apply the objectives to their tasks
    environments  with `data`: also make each environment of `evaluate.tasks` once
    index   with `data`: make the indexes that raw LeRobot folders lack; otherwise such folders are not looked into
    """
    seen = examine(path, overrides)
    quick = [*seen.errors, *_layout(seen, world), *_model(seen), *_objectives(seen)]
    if quick:
        raise RecipeError([*quick, *_deepspeed(seen)])
    recipe = from_dict(seen.raw, str(seen.file))
    # The environments are made by another process while this one imports DeepSpeed.
    opened = _open(recipe, index=index, environments=environments) if data else None
    try:
        errors = list(_deepspeed(seen))
        if errors:
            raise RecipeError(errors)
        found = (
            *config_errors(recipe, world),
            *rope_errors(recipe),
            *average_errors(recipe),
            *tracker_errors(recipe),
            *rate_errors(recipe),
            *(holder_errors(recipe) if data else ()),
        )
        errors += _located(found, seen.where)
        if opened is not None:
            errors += _data(recipe, seen, opened, environments)
    finally:
        if opened is not None:
            opened.close()
    if errors:
        raise RecipeError(errors)
    return recipe


def _open(recipe: Recipe, *, index: bool, environments: bool) -> Opened:
    from tiphys.launch.checks.opened import Opened

    return Opened(recipe, index=index, environments=environments)


def _section(raw: dict[str, Any], *path: str) -> dict[str, Any]:
    for key in path:
        value = raw.get(key)
        raw = value if isinstance(value, dict) else {}
    return raw


def _values(section: type, given: dict[str, Any], *keys: str) -> dict[str, int] | None:
    """The given values or defaults of these keys; None if the schema check has refused one of them."""
    values = {key: given.get(key, getattr(section, key)) for key in keys}
    known = section_fields(section)
    wrong = (
        not isinstance(v, int) or isinstance(v, bool) or key_of(known[key][1]).problem(v) for key, v in values.items()
    )
    return None if any(wrong) else values


def _located(found: Iterable[tuple[str, str]], where: Where) -> Iterator[str]:
    for key, reason in found:
        yield f"{where(key)}: {reason}"


def _deepspeed(seen: Examined) -> Iterator[str]:
    config = seen.raw.get("deepspeed", {})
    if not isinstance(config, dict):
        return  # an error of the schema
    if not devices():  # otherwise DeepSpeed warns that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    train = _values(Train, _section(seen.raw, "train"), "steps")
    found = dict[str, str]()
    for key, reason in (
        *section_errors(config),
        *optimizer_errors(config, bool(devices())),
        *scheduler_errors(config, train["steps"] if train else 0),
        *key_errors(config, bool(devices())),
    ):
        found.setdefault(key, reason)  # one reason for each key
    yield from _located(found.items(), seen.where)


def _layout(seen: Examined, world: int) -> Iterator[str]:
    config, found = _section(seen.raw, "deepspeed"), list[tuple[str, str]]()
    data = 0  # data-parallel processes; 0: unknown
    parallel = _values(Parallel, _section(seen.raw, "parallel"), "pipeline", "expert")
    if parallel is not None:
        pipeline, expert = parallel["pipeline"], parallel["expert"]
        found += zero_errors(config, pipeline, expert)
        if model := _values(Model, _section(seen.raw, "model"), "layers"):
            found += stage_errors(pipeline, model["layers"])
        if experts := _values(Experts, _section(seen.raw, "model", "moe"), "experts"):
            found += expert_errors(expert, experts["experts"])
        grid = list(grid_errors(world, pipeline, expert))
        found += grid
        data = 0 if grid else world // pipeline
    yield from _located([*batch_errors(config, data), *found], seen.where)


def _model(seen: Examined) -> Iterator[str]:
    given = _section(seen.raw, "model")
    model = _values(Model, given, *MODEL_SIZES)
    moe = _values(Experts, _section(given, "moe"), *EXPERT_SIZES)
    if model is not None:
        yield from _located(model_errors(model, moe), seen.where)
        yield from _located(tokenizer_errors(given.get("text_tokenizer"), model["text_vocabulary"]), seen.where)
    objectives = _section(seen.raw, "objectives").values()
    contexts = [o.get("context", Objective.context) for o in objectives if isinstance(o, dict)] or [Objective.context]
    yield from _located(
        batch_size_errors(_section(seen.raw, "deepspeed").get("train_batch_size"), contexts), seen.where
    )


def _objectives(seen: Examined) -> Iterator[str]:
    from tiphys.pretrain.tokens.paradigms import PARADIGMS, hiding_errors, paradigm_errors

    named, where = _section(seen.raw, "objectives"), seen.where
    for name, options in named.items():
        paradigm = options.get("paradigm") if isinstance(options, dict) else None
        yield from _located(paradigm_errors(name, paradigm or ""), where)
        known, more = PARADIGMS.get(paradigm or name), _section(options, "options") if isinstance(options, dict) else {}
        if known is not None:
            yield from _located(hiding_errors(name, known, more), where)
        asked = isinstance(options, dict) and options.get("target_return", Objective.target_return)
        if known is not None and asked not in (False, Objective.target_return) and not known.shows_returns:
            yield (
                f"{where(f'objectives.{name}.target_return')}: paradigm {known.name!r} shows the model no returns, so its policy "
                "cannot be asked for one; remove the key"
            )
    mixture = _section(seen.raw, "data").get("mixture")
    if not mixture:
        yield f"{where('data.mixture')} is empty; write at least one entry {{dataset: …}}"
    for i, entry in enumerate(mixture if isinstance(mixture, list) else ()):
        wanted = entry.get("objective", "gato") if isinstance(entry, dict) else "gato"
        if wanted not in named and wanted not in PARADIGMS:
            near = difflib.get_close_matches(str(wanted), [*named, *PARADIGMS], n=1)
            hint = (
                f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(dict.fromkeys([*named, *PARADIGMS]))}."
            )
            yield f"{where(f'data.mixture[{i}].objective')}: no objective is called {wanted!r}. {hint}"


def _data(recipe: Recipe, seen: Examined, opened: Opened, environments: bool) -> Iterator[str]:
    from tiphys.launch.checks.data import (
        data_errors,
        hub_errors,
        pairing_errors,
        requirement_errors,
        reward_errors,
        target_errors,
    )
    from tiphys.launch.checks.environments import environment_errors
    from tiphys.launch.plan import balance_of, make_plan, validation_rows
    from tiphys.pretrain.objectives import Objectives

    yield from _located(opened.errors, seen.where)
    indexes = opened.indexes
    if len(indexes) < len(recipe.data.mixture):
        return
    unrewarded = list(reward_errors(recipe, indexes, seen.where))
    yield from unrewarded
    if unrewarded:
        return
    try:
        objectives = Objectives(recipe, indexes)
    except ValueError as error:
        key, _, reason = str(error).partition(": ")
        known = key.startswith("objectives.") and " " not in key
        yield f"{seen.where(key)}: {reason}" if known else f"{seen.where('objectives')}: {error}"
        return
    yield from _located((*freeze_errors(recipe, objectives), *init_errors(recipe, objectives)), seen.where)
    yield from target_errors(recipe, objectives, seen.where)
    wrong = list(data_errors(recipe, indexes, objectives, seen.where))
    wrong += hub_errors(recipe, indexes, seen.where)
    wrong += requirement_errors(recipe, indexes, objectives, seen.where)
    yield from wrong
    if environments:
        yield from environment_errors(recipe, opened, objectives, seen.where)
    if wrong:
        return
    try:
        balance_of(recipe, objectives)
        plan = make_plan(recipe, indexes, objectives)
        yield from pairing_errors(recipe, objectives, plan, seen.where)
        if recipe.data.validation and any(one.held_out(recipe.data.validation).any() for one in indexes):
            make_plan(recipe, indexes, objectives, held_out=True, rows=validation_rows(recipe))
    except ValueError as error:
        yield f"{seen.where('data.mixture')}: {error}"
