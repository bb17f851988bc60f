"""Speed of acting with a key-value cache against computing the whole window at every step, side by side in one run.

    python -m benchmarks.act [--rows 1,10,64] [--contexts 64,256,1024] [--paradigms dt,gato,tt] [--json FILE]

The model has 4 layers of width 256, every other one a mixture of 4 experts, with random weights, and acts on one core with 5
tokens a step. Times are the process's own on one core.
All of an action's time is counted: fields to tokens, forward passes, and the decoded action. Windows are full. The cached policy
plays a whole cycle, from one hop to the next, so its rate holds the prefill of the hop. Between its steps, at a few places of
the cycle, the other policy (`hop=False`) acts with the largest window, as often as it takes to see its median time. At the same
places a forward pass over the whole window of the cached policy says by how much its logits differ. `tt` plans 5 steps with 32
plans, 2 actions each; both policies share the history among the plans, and its tokens are those of all plans.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter
from tiphys.pretrain.acting.history import History
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry
from tiphys.recipes.sections.model import Experts, Model
from tiphys.recipes.sections.objective import Objective

TASKS = {  # 5 tokens a step each
    "dt": TaskSpec(
        "dt",
        (
            *(FieldSpec(f"observation.{name}", "observation", "continuous", "float32", (4,)) for name in "abc"),
            FieldSpec("action", "action", "continuous", "float32", (2,), low=(-1.0,), high=(1.0,)),
            FieldSpec("reward", "reward", "continuous", "float32"),
        ),
    ),
    "gato": TaskSpec(
        "gato",
        (
            FieldSpec("observation", "observation", "continuous", "float32", (3,)),
            FieldSpec("action", "action", "discrete", "int64", values=7),
        ),
    ),
    "tt": TaskSpec(
        "tt",
        (
            FieldSpec("observation", "observation", "continuous", "float32", (2,)),
            FieldSpec("action", "action", "discrete", "int64", values=7),
            FieldSpec("reward", "reward", "continuous", "float32"),
        ),
    ),
}
OPTIONS = {"tt": {"horizon": 5, "width": 32, "expand": 2}}
PLACES = 4  # of a cycle, at which the whole window is computed


class Recorded(Policy):
    """Keeps the last hidden states."""

    hidden: torch.Tensor | None = None

    def _choose(
        self, acting: Any, number: int, hidden: torch.Tensor, environments: list[int], *tilt: Any
    ) -> np.ndarray:
        self.hidden = hidden
        return super()._choose(acting, number, hidden, environments, *tilt)


@torch.inference_mode()
def answer(model: DecisionModel, slot: Any, hidden: torch.Tensor) -> torch.Tensor:
    return model.regress(hidden, slot.head) if slot.head else model.logits(hidden)


SIZES = Model(layers=4, hidden=256, heads=4, text_vocabulary=300, moe=Experts(experts=4, experts_per_token=2))


def policies(paradigm: str, context: int, folder: Path, sizes: Model = SIZES) -> tuple[Recorded, Policy]:
    """The policy that remembers, and the one that computes every window. They have the same weights."""
    task, rng = TASKS[paradigm], np.random.default_rng(0)
    with ShardWriter(str(folder), [task]) as writer:
        for i in range(4):
            fields = {f.name: values(f, 20, rng) for f in task.fields}
            writer.write(Episode(f"e{i}", task.name, fields, 20))
    recipe = Recipe(
        name="act",
        data=Data(mixture=[Entry(dataset=str(folder), objective="it")]),
        objectives={"it": Objective(paradigm=paradigm, context=context, options=OPTIONS.get(paradigm, {}))},
        model=sizes,
        run=Run(dir="unused"),
    )
    objectives = Objectives(recipe, [EpisodeIndex.open(str(folder))])
    model = DecisionModel(DecisionConfig.from_recipe(sizes, objectives.vocabulary))
    processor = Processor.from_dict(json.loads(json.dumps(objectives.processor())))
    return Recorded(model, processor), Policy(model, processor, hop=False)


def values(field: FieldSpec, rows: int, rng: np.random.Generator) -> np.ndarray:
    if field.values:
        return rng.integers(0, field.values, (rows, *field.shape)).astype(field.dtype)
    return rng.uniform(-1, 1, (rows, *field.shape)).astype(field.dtype)


def observations(task: TaskSpec, rows: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    fields = {f.name: values(f, rows, rng) for f in task.with_role("observation")}
    return [{name: value[i] for name, value in fields.items()} for i in range(rows)]


def skip(history: History, task: TaskSpec, rows: int, steps: int, rng: np.random.Generator) -> None:
    """Steps of an episode without the model: random actions."""
    for _ in range(steps):
        history.observe(observations(task, rows, rng), [0.0] * rows)
        actions = {f.name: values(f, rows, rng) for f in task.with_role("action")}
        history.acted(actions)


def whole_window(policy: Policy, twin: History, seen: list[Any], taken: dict[str, np.ndarray], compute: bool) -> Any:
    """What the model says about the last step, from one pass over all windows. `twin` follows the policy's history."""
    acting = twin.observe(seen, [0.0] * len(seen))
    said = None
    if compute:
        inputs = to_tensors(acting.batch)
        with torch.inference_mode():
            hidden = unpack(policy.model(inputs).hidden, inputs, len(seen), acting.batch.length)
            said = answer(policy.model, acting.slots[0], hidden[np.arange(len(seen)), acting.open - 1])
    twin.acted(taken)
    return said


def measure(paradigm: str, rows: int, context: int, folder: Path) -> dict[str, float]:
    policy, other = policies(paradigm, context, folder)
    task, rng, zeros = TASKS[paradigm], np.random.default_rng(1), [0.0] * rows
    policy.reset(task.name, rows)
    other.reset(task.name, rows)
    layout = policy.history.layout
    most = layout.steps(0, context) - policy.history.reserve
    cycle = most - most // 2 + 1
    twin = policy.processor.history(task.name, rows, hop=True, reserve=policy.history.reserve)
    skip(other.history, task, rows, most, rng)
    other.act(observations(task, rows, rng), zeros)
    for _ in range(most):  # until the window is full, with the first hop ahead
        seen = observations(task, rows, rng)
        policy.act(seen, zeros)
        whole_window(policy, twin, seen, taken(policy), False)
    cached: list[float] = []
    whole: list[float] = []
    worst, before = 0.0, policy.recall.tokens
    places = set(np.linspace(0, cycle - 1, PLACES).astype(int).tolist())
    for step in range(cycle):
        seen = observations(task, rows, rng)
        begin = time.process_time()
        policy.act(seen, zeros)
        cached.append(time.process_time() - begin)
        said = whole_window(policy, twin, seen, taken(policy), step in places)
        if step in places:
            if policy.hidden is not None:
                mine = answer(policy.model, policy.history.slots[0], policy.hidden)
                worst = max(worst, float((said - mine).abs().max()))
            begin = time.process_time()
            other.act(seen, zeros)
            whole.append(time.process_time() - begin)
    tokens = policy.recall.tokens - before
    ms, slow = 1e3 * statistics.mean(cached), 1e3 * statistics.median(whole)
    return {
        "step_width": layout.width,
        "ms_a_step": ms,
        "ms_without_hop": 1e3 * statistics.median(cached),
        "ms_recomputed": slow,
        "actions_a_second": 1e3 * rows / ms,
        "times_as_fast": slow / ms,
        "tokens_an_action": tokens / (cycle * rows),
        "resident_mb": policy.recall.bytes / 1e6,
        "largest_difference": worst,
    }


def taken(policy: Policy) -> dict[str, np.ndarray]:
    """The actions of the last step, [rows, *shape] of each field."""
    last = [episode.actions[-1] for episode in policy.history._episodes]
    return {name: np.stack([one[name] for one in last]) for name in last[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,10,64")
    parser.add_argument("--contexts", default="64,256,1024")
    parser.add_argument("--paradigms", default="dt,gato,tt")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    print(
        "| | rows | context | ms a step | recomputed | times as fast | actions/s | tokens an action | MB | largest Δ |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIPHYS_CACHE"] = str(Path(folder, "cache"))
        for paradigm in arguments.paradigms.split(","):
            for context in map(int, arguments.contexts.split(",")):
                for rows in map(int, arguments.rows.split(",")):
                    name = f"{paradigm}/{context}/{rows}"
                    r = results[name] = measure(paradigm, rows, context, Path(folder, name.replace("/", "-")))
                    print(
                        f"| {paradigm} | {rows} | {context} | {r['ms_a_step']:.1f} ({r['ms_without_hop']:.1f} without hop) "
                        f"| {r['ms_recomputed']:.0f} | {r['times_as_fast']:.1f} | {r['actions_a_second']:.0f} "
                        f"| {r['tokens_an_action']:.2f} of {r['step_width']:.0f} | {r['resident_mb']:.1f} "
                        f"| {r['largest_difference']:.1e} |",
                        flush=True,
                    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
