"""Golden values: tokens of given windows, draws of a plan, and losses of twenty steps. They must not change by accident.

`data/` holds 20 episodes that `tiphys collect` wrote. `golden.json` holds the values that follow from them. A change that should
not alter numerics leaves that file as it is. A change that should alter them says why, and writes the file again:

    OMP_NUM_THREADS=1 python -m tests.golden.golden            # compare, and print what differs
    OMP_NUM_THREADS=1 python -m tests.golden.golden --write    # write golden.json again
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import Window
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import TrajectoryLoader
from tiphys.launch.plan import loader_arguments, make_plan
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.load import from_dict
from tiphys.recipes.schema import Recipe

HERE = Path(__file__).parent
FILE = HERE / "golden.json"
STEPS = 20
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bc": {"context": 96, "window": 8},
    "dt": {"context": 96, "window": 20},
    "gato": {"context": 900, "prompt": 0.5, "prompt_steps": 1},
}


def recipe(objective: str, run_dir: str = "unused") -> Recipe:
    names = ("grid", "cart", "pendulum")
    return from_dict(
        {
            "name": f"golden-{objective}",
            "data": {
                "mixture": [{"dataset": str(HERE / "data" / name), "objective": objective} for name in names],
                "validation": 0.0,
            },
            "objectives": {objective: OBJECTIVES[objective]},
            "model": {"layers": 2, "hidden": 32, "heads": 2, "text_vocabulary": 300, "moe": {"experts": 4}},
            "train": {"steps": STEPS, "seed": 7},
            "deepspeed": {
                "train_batch_size": 6,
                "gradient_clipping": 1.0,
                "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
                "zero_optimization": {"stage": 1},
            },
            "run": {"dir": run_dir},
        }
    )


def opened(plan: Recipe) -> tuple[list[EpisodeIndex], Objectives]:
    indexes = [EpisodeIndex.open(entry.dataset) for entry in plan.data.mixture]
    return indexes, Objectives(plan, indexes)


def digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 of named arrays: names, types, shapes and bytes."""
    out = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        out.update(f"{name} {array.dtype.str} {array.shape}".encode())
        out.update(array.tobytes())
    return out.hexdigest()


def window(index: EpisodeIndex, entry: int, task: int, episode: int, start: int, steps: int, prompt: bool) -> Window:
    """The window of some rows of an episode, read without a plan."""
    fields = [f.name for f in index.tasks[0].fields]
    ranges = index.ranges(episode, start, steps, fields)
    buffers = index.store.read_ranges(
        index.shard_name(int(index.shard[episode])), [r.offset for r in ranges], [r.size for r in ranges]
    )
    decoded = index.decode(episode, start, steps, fields, buffers)
    return Window(
        entry=entry,
        task=task,
        episode=index.id(episode),
        start=start,
        steps=steps,
        episode_steps=int(index.steps[episode]),
        prompt=prompt,
        **decoded,
    )


def tokens(objective: str) -> list[str]:
    """Digest of each of 12 rows of fixed windows. Every second row has a prompt."""
    indexes, objectives = opened(recipe(objective))
    found = []
    for number in range(12):
        entry = number % len(indexes)
        index, task = indexes[entry], int(objectives.task_numbers(entry)[0])
        episode, other = number % index.episodes, (number + 1) % index.episodes
        read = partial(window, index, entry, task)
        steps = min(2, int(index.steps[episode]))
        row = [read(other, 0, 1, True)] if number % 2 else []
        row += [read(episode, start, steps, False) for start in (0, int(index.steps[episode]) - steps)]
        arrays = objectives.make_batch(number, np.array([number]), [row], seed=7)
        found.append(digest(arrays))
    return found


def draws(objective: str) -> list[str]:
    """Digest of each of three planned batches."""
    values = recipe(objective)
    indexes, objectives = opened(values)
    plan = make_plan(values, indexes, objectives)
    return [digest(plan.windows(step)._asdict()) for step in range(3)]


def train(objective: str, folder: str) -> tuple[list[float], str]:
    """Losses of twenty steps in this process, and the digest of the last checkpoint's weights."""
    from tests.processes import alone
    from tiphys.pretrain.callbacks import Callback, Checkpointer
    from tiphys.pretrain.checkpoint import Checkpoint, export_weights
    from tiphys.pretrain.engine import build_engine
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.trainer import Trainer

    class Losses(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_step(self, trainer: Trainer, metrics: Any) -> None:
            self.losses.append(float(metrics.result.loss))

    values, world = recipe(objective, folder), alone()
    indexes, objectives = opened(values)
    plan = make_plan(values, indexes, objectives)
    model = DecisionModel(DecisionConfig.from_recipe(values.model, objectives.vocabulary), seed=values.train.seed)
    engine, losses = build_engine(values, model, world), Losses()
    try:
        with TrajectoryLoader(plan, world.home, **loader_arguments(values, objectives), stop=STEPS) as loader:
            Trainer(values, engine, loader, [losses, Checkpointer(folder, 0)], ["golden"]).fit()
    finally:
        engine.destroy()
    checkpoint = Checkpoint.newest_whole(folder)
    assert checkpoint is not None
    weights = {name: tensor.float().numpy() for name, tensor in export_weights(checkpoint).items()}
    return losses.losses, digest(weights)


def measure() -> dict[str, Any]:
    """The values of all objectives, as in golden.json."""
    found: dict[str, Any] = {}
    for objective in OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            losses, weights = train(objective, folder)
        found[objective] = {
            "tokens": tokens(objective),
            "draws": draws(objective),
            "losses": losses,
            "weights": weights,
        }
    return found


def main() -> int:
    found = measure()
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    known = json.loads(FILE.read_text(encoding="utf-8"))
    differ = [f"{name}.{key}" for name in known for key in known[name] if known[name][key] != found[name][key]]
    print("differs: " + ", ".join(differ) if differ else "equal to the bit")
    return len(differ)


if __name__ == "__main__":
    sys.exit(main())
