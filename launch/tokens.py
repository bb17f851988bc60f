"""`tiphys tokens`: one training row as the model will see it, decoded."""

from __future__ import annotations

from collections.abc import Sequence


def show_row(recipe_path: str, overrides: Sequence[str], step: int, row: int) -> str:
    """The positions of a row, a line each: window, what it is, its value, what is to be predicted there."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.dataio.placement import Home
    from tiphys.launch.check import check
    from tiphys.launch.plan import loader_arguments, make_plan, open_datasets
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.pretrain.tokens.describe import describe_row

    recipe = check(recipe_path, overrides)
    indexes = open_datasets(recipe)
    objectives = Objectives(recipe, indexes)
    plan = make_plan(recipe, indexes, objectives)
    if not 0 <= row < plan.rows:
        raise IndexError(f"a batch of this recipe has rows 0 … {plan.rows - 1}, not {row}")
    home = Home(process=0, processes=1, weights=None)
    with TrajectoryLoader(plan, home, **loader_arguments(recipe, objectives), start=step, stop=step + 1) as loader:
        loaded = next(loader)
        batch = TokenBatch.from_arrays({name: array.copy() for name, array in loaded.arrays.items()})
        loaded.release()
    lines = [f"step {step}, row {row}: {int((batch.segment[row] > 0).sum())} of {batch.length} positions"]
    for entry in describe_row(batch, row, objectives.vocabulary):
        lines.append("  ".join(f"{key} {value}" for key, value in entry.items() if value not in (None, "")))
    return "\n".join(lines)
