"""`tiphys layout`: from a recipe's file to what it will need; and the layout of a run whose recipe leaves it to the system."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import to_json, write_json
from tiphys.dataio.errors import Explained
from tiphys.dataio.messages import say
from tiphys.launch.devices import device_memory, devices
from tiphys.launch.layout_calibration import calibrate
from tiphys.launch.layout_rates import Rates, measured_rates, table_rates
from tiphys.launch.statuses import Status
from tiphys.recipes.automatic import KEYS, open_keys
from tiphys.recipes.sizes import parse_size

if TYPE_CHECKING:
    from tiphys.launch.layout import Cut
    from tiphys.launch.layout_batches import Batches
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.recipes.schema import Recipe

FILE = "layout.json"  # in a run's folder: the layout that was chosen, and for how many processes


class NothingFits(Explained, ValueError):
    """No layout of a recipe fits the memory."""


@dataclass(frozen=True)
class Sized:
    """A recipe with the model and the batches that it will have. `keys`: short names of those that are to be filled."""

    recipe: Recipe
    config: DecisionConfig
    batches: Batches
    keys: list[str]


def sized(path: str, overrides: Sequence[str], world: int = 0) -> Sized:
    """Open a recipe and its datasets. Raises RecipeError if anything is wrong."""
    from tiphys.launch.check import check
    from tiphys.launch.layout_batches import find_batches
    from tiphys.launch.plan import make_plan, open_datasets
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.objectives import Objectives
    from tiphys.recipes.load import examine

    keys = open_keys(examine(path, overrides).written)
    recipe = check(path, overrides, world=0 if keys else world, environments=False)
    indexes = open_datasets(recipe)
    objectives = Objectives(recipe, indexes)
    plan = make_plan(recipe, indexes, objectives)
    config = DecisionConfig.from_recipe(recipe.model, objectives.vocabulary)
    return Sized(recipe, config, find_batches(recipe, plan, objectives), keys)


def layout(
    path: str,
    overrides: Sequence[str],
    world: int,
    memory: str,
    *,
    device: str = "",
    calibrated: bool = False,
    as_json: bool = False,
) -> Status:
    """Print what a recipe needs. REFUSED if it does not fit."""
    from tiphys.launch.layout import by_operations, changed, predict, remedies
    from tiphys.launch.layout_auto import choices, shown
    from tiphys.launch.layout_lines import lines

    most = parse_size(memory)
    found = sized(path, overrides, world)
    recipe, config, batches = found.recipe, found.config, found.batches
    kind = "cpu" if device == "cpu" else "cuda"
    if calibrated:
        kind = "cuda" if has_cuda() else "cpu"
        rates: Rates | None = _calibrate(recipe, config, batches, world, kind)
    else:
        rates = known_rates(recipe, device, kind)
    numbers: dict[str, Any] = {"device": kind, "rates": rates, "step_tokens": batches.tokens}
    table = ""
    cut: Cut = Measured(world, kind) if calibrated else by_operations
    if found.keys:
        offered = choices(
            recipe,
            config,
            batches.worst,
            world,
            found.keys,
            most,
            **{**numbers, "rates": rates or any_rates(kind)},
            cut=cut,
        )
        if not offered:
            raise NothingFits(f"no layout on {world} devices fits {memory}; use more devices or a smaller model")
        table = shown(offered, found.keys)
        recipe, config = changed(recipe, config, offered[0].values)
    bounds = cut(recipe, config)
    needs = predict(recipe, config, batches.worst, world, **numbers, step_bytes=batches.bytes, bounds=bounds)
    fits = needs.peak <= most
    advice = [] if fits else remedies(recipe, config, batches.worst, world, most, device=kind, cut=cut)
    if as_json:
        say(to_json({**needs.to_dict(), "memory": most, "fits": needs.peak <= most, "change": advice}, indent=1))
    else:
        text = lines(needs, most)
        if needs.peak > most:
            text[-1] = f"needs {needs.peak / 2**30:.3g} of {most / 2**30:.3g} GiB; " + (
                f"fits with {' or '.join(advice)}" if advice else "use more devices, or a smaller model or context"
            )
        say("\n".join([*([table] if table else []), *text]))
    return Status.DONE if needs.peak <= most else Status.REFUSED


def chosen_overrides(path: str, overrides: Sequence[str], world: int) -> list[str]:
    """`key=value` for each key that a recipe leaves to `parallel.auto`; empty if there is none.

    A run that is resumed on as many processes keeps its layout. Raises NothingFits if nothing fits.
    """
    from tiphys.launch.layout_auto import choices, shown
    from tiphys.recipes.load import examine, find

    seen = examine(path, overrides)
    keys = open_keys(seen.written)
    if not keys:
        return []
    run = Path(str((seen.raw.get("run") or {}).get("dir", "")))
    known = _kept(run / FILE, world, keys)
    if known:
        say(f"layout       as before: {' '.join(known)}")
        return known
    found = sized(str(find(path)), overrides)
    kind = "cuda" if has_cuda() else "cpu"
    rates = known_rates(found.recipe, "", kind) or any_rates(kind)
    memory = device_memory(world)
    offered = choices(
        found.recipe,
        found.config,
        found.batches.worst,
        world,
        keys,
        memory,
        device=kind,
        rates=rates,
        step_tokens=found.batches.tokens,
    )
    if not offered:
        raise NothingFits(
            f"parallel.auto: no layout on {world} processes fits {memory / 2**30:.1f} GiB; use more processes"
        )
    say(shown(offered, keys))
    words = offered[0].overrides(keys)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / FILE, {"world": world, "overrides": words, "basis": rates.basis})
    say(f"layout       chosen: {' '.join(words)} ({rates.basis})")
    return words


def _kept(file: Path, world: int, keys: Sequence[str]) -> list[str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        words = [str(word) for word in found["overrides"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    named = {word.partition("=")[0] for word in words}
    return words if found.get("world") == world and named == {KEYS[name] for name in keys} else []


def _calibrate(recipe: Recipe, config: DecisionConfig, batches: Batches, world: int, kind: str) -> Rates:
    from tiphys.pretrain.distributed.deepspeed_config import derive
    from tiphys.pretrain.parallel import Grid

    sizes = derive(recipe, Grid(0, world, recipe.parallel.pipeline, recipe.parallel.expert), accelerator=kind)
    batch = batches.worst[0]
    return calibrate(config, batch.select(slice(0, min(batch.rows, sizes.micro_batch))), 2 if sizes.bf16 else 4, world)


class Measured:
    """Pipeline stages as a run on this machine would cut them: by the measured time of each layer. Empty if it would not measure.

    Layers are timed once for each size of a micro-batch, number of ranks that share experts, and kind of backward pass.
    """

    def __init__(self, world: int, kind: str) -> None:
        self._world, self._kind = world, kind
        self._costs: dict[tuple[int, int, bool], list[float]] = {}

    def __call__(self, recipe: Recipe, config: DecisionConfig) -> Sequence[int]:
        from tiphys.pretrain.distributed.deepspeed_config import derive
        from tiphys.pretrain.model.pipeline import partition
        from tiphys.pretrain.parallel import Grid

        layout = recipe.parallel
        if layout.pipeline == 1 or not layout.measure:
            return ()
        sizes = derive(recipe, Grid(0, self._world, layout.pipeline, layout.expert), accelerator=self._kind)
        key = sizes.micro_batch, layout.expert, config.checkpointing
        if key not in self._costs:
            self._costs[key] = self._timed(recipe, config, sizes.micro_batch, sizes.bf16)
        return partition(config, layout.pipeline, costs=self._costs[key])

    def _timed(self, recipe: Recipe, config: DecisionConfig, rows: int, bf16: bool) -> list[float]:
        import torch

        from tiphys.pretrain.distributed.layer_costs import layer_seconds
        from tiphys.recipes.sections.objective import Objective

        length = max((o.context for o in recipe.objectives.values()), default=Objective.context)
        dtype = torch.bfloat16 if bf16 else torch.float32
        return layer_seconds(config, rows, length, torch.device(self._kind), dtype, expert=recipe.parallel.expert)


def known_rates(recipe: Recipe, device: str, kind: str) -> Rates | None:
    """Rates of a device by its name, or those measured on this machine; None if there are none."""
    from tiphys.pretrain.distributed.layout_errors import bf16_enabled

    if device and device != "cpu":
        return table_rates(device)
    here = "cuda" if has_cuda() else "cpu"
    return measured_rates(2 if bf16_enabled(recipe.deepspeed) else 4) if kind == here else None


def any_rates(kind: str) -> Rates:
    """Rates for a ranking if nothing is known of the device."""
    rates = table_rates("A100")
    return replace(rates, basis="not measured: run `tiphys layout --calibrate`; ranked as on an A100")


def has_cuda() -> bool:
    """This machine has a GPU."""
    return devices() > 0
