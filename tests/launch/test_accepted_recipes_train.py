"""A recipe that `tiphys check` accepts starts training: one key of a small recipe is changed, and the first step must work."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import processes
from tests.launch import one_step
from tiphys.launch.check import check
from tiphys.launch.checks.deepspeed_keys import MODELS, SCALARS, TABLES, _plain_type
from tiphys.launch.checks.optimizer import OPTIMIZER, SCHEDULER, SCHEDULERS
from tiphys.pretrain.parallel import ParallelDims
from tiphys.recipes.keys import Key, leaves
from tiphys.recipes.load import RecipeError
from tiphys.recipes.schema import Recipe

# `train.compile` compiles for minutes; the others name places.
LEFT_OUT = {"train.compile", "name", "run.dir", "data.mixture[*].dataset"}
WORDS = {
    bool: [True, False],
    int: [-1, 0, 1, 2, 3, 4, 8, 17],
    float: [-1.0, 0.0, 1e-6, 0.1, 0.5, 1.0, 3.0, 1e5, math.nan, math.inf],
    str: ["", "x", "auto", "cpu", "bf16", "linear", "1e-3"],
    list: [[], ["x"]],
    list[str]: [[], ["*"], ["reach"], ["layers.0.*"], ["nothing"]],
}
ANYTHING = [None, True, 0, 1, -1, 0.5, "x", "1e-3", [], {}, [1], {"x": 1}]


def values(hint: Any, key: Key) -> list[Any]:
    """Values of a key of this type, of which some are wrong."""
    if key.size:  # how much memory is enough depends on the data
        return ["64MiB", "1.5GiB", "2 TB", "x"]
    edges = [edge for edge in (key.low, key.above, key.below) if edge is not None]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    return [*key.choices, *WORDS.get(hint, []), *(int(e) if hint is int else e for e in edges)]


def keys() -> Iterator[tuple[str, list[Any]]]:
    """Path of each key that can be changed, and values for it. In a path, `bc` is the objective and `0` the mixture entry."""
    for leaf in leaves(Recipe):
        if leaf.path not in LEFT_OUT and leaf.path != "deepspeed":
            path = (
                leaf.path.replace("[*]", ".0")
                .replace("fields.*", "fields.action")
                .replace("objectives.*", "objectives.bc")
            )
            yield path, values(leaf.type, leaf.key)
    tables = {"": SCALARS, **{f".{name}": table for name, table in TABLES.items()}}
    tables |= {".optimizer.params": OPTIMIZER, ".scheduler.params": SCHEDULER}
    for section, table in tables.items():
        for name, wanted in table.items():
            yield f"deepspeed{section}.{name}", values(wanted.type, wanted.key)
    for section, (module, model) in MODELS.items():
        yield from of_model(f"deepspeed.{section}", getattr(importlib.import_module(module), model))
    yield "deepspeed.scheduler.type", list(SCHEDULERS)
    yield "deepspeed.optimizer.type", ["Adam", "Lamb"]
    yield "deepspeed.optimizer.params.betas", [[0.0, 0.9], [0.9, 1.0], 0.9]
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        yield f"deepspeed.{name}", WORDS[int]


def of_model(path: str, model: Any) -> Iterator[tuple[str, list[Any]]]:
    for name, field in model.model_fields.items():
        hint, _ = _plain_type(field.annotation)
        if hasattr(hint, "model_fields"):
            yield from of_model(f"{path}.{name}", hint)
        else:
            yield f"{path}.{name}", values(hint, Key(""))


CHANGES = st.sampled_from(list(keys())).flatmap(
    lambda key: st.tuples(st.just(key[0]), st.sampled_from(key[1] or ANYTHING) | st.sampled_from(ANYTHING))
)
STAGES = st.sampled_from([0, 1, 1, 2, 3])


@pytest.fixture(scope="module")
def world() -> ParallelDims:
    return processes.alone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accepted")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> dict[str, Any]:
    return one_step.make(folder)


def changed(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    out = copy.deepcopy(recipe)
    node: Any = out
    *parents, last = path.split(".")
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    if "enabled" not in path and path.startswith(
        ("deepspeed.bf16", "deepspeed.flops_profiler", "deepspeed.csv_monitor")
    ):
        node["enabled"] = True
    node[last] = value
    return out


def start(folder: Path, recipe: dict[str, Any], world: ParallelDims, path: str, value: Any, stage: int) -> bool:
    """Check the changed recipe, and train it if it is accepted. Returns whether it is."""
    values = changed(changed(recipe, "deepspeed.zero_optimization.stage", stage), path, value)
    try:
        accepted = check(one_step.write(folder, values), world=1)
    except RecipeError:
        return False
    assert math.isfinite(one_step.train(accepted, world))
    return True


def test_the_recipe_itself_is_accepted_and_trains(folder: Path, recipe: dict[str, Any], world: ParallelDims) -> None:
    assert start(folder, recipe, world, "train.seed", 1, 1)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(change=CHANGES, stage=STAGES)
def test_an_accepted_recipe_trains(folder, recipe, world, change, stage) -> None:
    start(folder, recipe, world, *change, stage)


@pytest.mark.long
@pytest.mark.timeout(0)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(change=CHANGES, stage=STAGES)
def test_many_accepted_recipes_train(folder, recipe, world, change, stage) -> None:
    start(folder, recipe, world, *change, stage)
