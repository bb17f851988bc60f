"""`parallel.auto`: the keys that a recipe leaves to the system, filled with the fastest layout that fits the memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiphys.launch.layout import Cut, Needs, by_operations, changed, predict
from tiphys.pretrain.distributed.layout_errors import batch_errors, section_errors, zero_errors
from tiphys.pretrain.parallel import LayoutError
from tiphys.recipes.automatic import KEYS

if TYPE_CHECKING:
    from tiphys.launch.layout_rates import Rates
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.recipes.schema import Recipe

SHOWN = 5


@dataclass(frozen=True)
class Choice:
    """One layout: short name of each key (`KEYS`) -> its value, and what it needs."""

    values: Mapping[str, Any]
    needs: Needs

    def overrides(self, keys: Sequence[str]) -> list[str]:
        """`key=value` of the keys that are to be filled."""
        return [f"{KEYS[name]}={str(self.values[name]).lower()}" for name in keys]


def choices(
    recipe: Recipe,
    config: DecisionConfig,
    worst: Sequence[TokenBatch],
    world: int,
    keys: Sequence[str],
    memory: int,
    *,
    device: str,
    rates: Rates,
    step_tokens: float = 0.0,
    cut: Cut = by_operations,
) -> list[Choice]:
    """The fastest layouts that fit, at most `SHOWN`. Deterministic.

    keys  short names of the keys that are to be chosen; the others stay as the recipe has them
    cut   how pipeline stages are cut

    Of layouts with equal times, the one with the largest micro-batch comes first, then the one without recomputation.
    """
    timed: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}
    for values in layouts(recipe, config, world, keys):
        section, made = changed(recipe, config, values)
        numbers: dict[str, Any] = {"device": device, "rates": rates, "step_tokens": step_tokens}
        try:
            quick = predict(section, made, worst, world, **numbers, counted=False, bounds=cut(section, made))
        except LayoutError:
            continue
        if quick.peak > memory:
            continue
        sizes, grid = quick.derived, quick.grid
        full = {**values, "micro_batch": sizes.micro_batch}
        order = (
            round(quick.seconds or 0.0, 9),
            -sizes.micro_batch,
            quick.checkpointing,
            sizes.stage,
            grid.pipeline,
            grid.expert,
        )
        timed[tuple(sorted(full.items()))] = (order, full)
    found = list[Choice]()
    for _, values in sorted(timed.values(), key=lambda one: one[0]):
        section, made = changed(recipe, config, values)
        numbers = {"device": device, "rates": rates, "step_tokens": step_tokens}
        needs = predict(section, made, worst, world, **numbers, bounds=cut(section, made))
        if needs.peak <= memory:
            found.append(Choice(values, needs))
        if len(found) == SHOWN:
            break
    return found


def layouts(recipe: Recipe, config: DecisionConfig, world: int, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Layouts that the engine does not refuse."""
    rows = int(recipe.deepspeed["train_batch_size"])
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    experts = [n for n in divisors if n == 1 or (config.num_experts and config.num_experts % n == 0)]
    options: dict[str, list[Any]] = {
        "pipeline": [n for n in divisors if n <= config.num_hidden_layers],
        "expert": experts,
        "zero_stage": [1, 2, 3],
        "micro_batch": [1 << i for i in range(22) if 1 << i <= rows] or [1],
        "checkpointing": [False, True],
    }
    names = [name for name in KEYS if name in keys]
    for chosen in itertools.product(*(options[name] for name in names)):
        values = dict(zip(names, chosen, strict=True))
        made, _ = changed(recipe, config, values)
        pipeline, expert = made.parallel.pipeline, made.parallel.expert
        if world % (pipeline * expert):
            continue
        data = world // pipeline
        if "micro_batch" in values and values["micro_batch"] >= 2 * -(-rows // data):
            continue
        errors = [*section_errors(made.deepspeed), *zero_errors(made.deepspeed, pipeline, expert)]
        if not [*errors, *batch_errors(made.deepspeed, data)]:
            yield values


def shown(found: Sequence[Choice], keys: Sequence[str]) -> str:
    """The first choices as a table."""
    from tiphys.launch.display import human_bytes, table

    rows = [
        (i, *(c.values[name] for name in keys), f"{c.needs.seconds or 0:.3g} s", human_bytes(c.needs.peak))
        for i, c in enumerate(found, 1)
    ]
    return table(("", *(KEYS[name].rpartition(".")[2] for name in keys), "a step", "memory"), rows)
