"""The steps of a benchmark, by the commands and the public functions of Tiphys: collect, train, evaluate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.stages import Stages

ROOT = Path(__file__).parents[2]


@dataclass
class Work:
    """What all stages of a benchmark share.

    Attributes
    ----------
    stages : Stages
        The record, in the folder that everything is written to.
    processes : int
        Processes that collect, train and play.
    """

    stages: Stages
    processes: int = 1
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.stages.folder / "log.txt"

    def folder(self, *parts: str) -> Path:
        """A folder of the benchmark."""
        return self.stages.folder.joinpath(*parts).resolve()

    def collect(self, name: str, task: str, episodes: int, *options: str, seed: int = 0) -> dict[str, Any]:
        """Collect one task into `datasets/NAME`. The result has the scores of random actions and of the agent."""
        to = self.folder("datasets", name)
        words = [task, "--episodes", str(episodes), "--seed", str(seed), *options]

        def do() -> dict[str, Any]:
            from tiphys import EpisodeIndex

            shutil.rmtree(to, ignore_errors=True)  # what an interrupted stage has left
            self.tiphys("collect", *words, "--to", str(to), "--processes", str(self.processes))
            index = EpisodeIndex.open(str(to))
            spec = index.tasks[0]
            found = {"episodes": int(index.episodes), "steps": int(index.steps.sum())}
            return {**found, "random": spec.random, "expert": spec.expert, "dataset": str(to)}

        return self.stages.run("collected", {"dataset": name, "task": task}, words, do)["result"]

    def train(self, name: str, seed: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Train a recipe (without `name`, `run` and seed). The result has the policy's folder and what training took."""
        run = self.folder("runs", f"{name}-{seed}")
        whole = {"name": "quality", **recipe, "run": {"dir": str(run)}}
        whole["train"] = {**recipe["train"], "seed": seed}

        def do() -> dict[str, Any]:
            run.mkdir(parents=True, exist_ok=True)
            file = run / "given.yaml"
            if file.is_file() and json.loads(file.read_text()) != whole:
                shutil.rmtree(run)  # another recipe's run
                run.mkdir()
            file.write_text(json.dumps(whole, indent=1))  # JSON is YAML
            self.tiphys("train", str(file), "--processes", str(self.processes))
            return {"policy": str(run / "policy"), **spent(run / "metrics.jsonl")}

        return self.stages.run("trained", {"run": name, "seed": seed}, whole, do)["result"]

    def flops(self, name: str, recipe: Mapping[str, Any]) -> float:
        """Operations of a training step of a recipe (without `train`)."""

        def do() -> dict[str, Any]:
            return {"flops": measure({**recipe, "train": {"steps": 100}})[0]}

        return self.stages.run("measured", {"run": name}, recipe, do)["result"]["flops"]

    def fit(self, name: str, seed: int, recipe: Mapping[str, Any], rate: float) -> dict[str, Any]:
        """As `train`, for short experiments: in this process, with torch's AdamW instead of DeepSpeed."""
        folder = self.folder("policies", f"{name}-{seed}")
        whole = {**recipe, "train": {**recipe["train"], "seed": seed}}

        def do() -> dict[str, Any]:
            from benchmarks.ideas.training import fit, publish
            from tiphys.recipes.load import from_dict

            shutil.rmtree(folder, ignore_errors=True)
            found = fit(from_dict({"name": "quality", **whole, "run": {"dir": "unused"}}), rate)
            publish(found.policy, folder)
            took = {"steps": found.steps, "flops": found.flops, "tokens": found.tokens, "loss": found.loss}
            return {"policy": str(folder), **took}

        return self.stages.run("trained", {"run": name, "seed": seed}, [whole, rate], do)["result"]

    def evaluate(
        self,
        name: str,
        seed: int,
        policy: str,
        task: str,
        episodes: int,
        asked: Mapping[str, Mapping[str, str]] | None = None,
        *,
        sample: bool | None = None,
    ) -> dict[str, Any]:
        """Play a task with a policy. The result is the entry of evaluation.json.

        asked   fields of `Asking`
        sample  draw the actions; None: as the policy does by default
        """
        given: dict[str, Any] = dict(asked or {})
        settings = {"policy": digest(policy), "episodes": episodes, "asked": given}
        if sample is not None:
            settings["sample"] = sample

        def do() -> dict[str, Any]:
            from tiphys import evaluate
            from tiphys.pretrain.acting.ask import Asking

            how: dict[str, Any] = {"episodes": episodes, "processes": self.processes, "sample": sample}
            return evaluate(policy, [task], **how, asking=Asking(**given))["tasks"][task]

        return self.stages.run("evaluated", {"run": name, "seed": seed, "task": task}, settings, do)["result"]

    def tiphys(self, *words: str) -> None:
        """Run a command of Tiphys. Raises RuntimeError, with the end of what it printed, if it fails."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ tiphys {' '.join(words)}\n")
            log.flush()
            begin = log.tell()
            status = subprocess.run(
                [sys.executable, "-m", "tiphys", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                check=False,
            ).returncode
        if status:
            said = self.log.read_bytes()[begin:].decode(errors="replace")
            raise RuntimeError(f"tiphys {words[0]} ended with status {status} ({self.log}):\n{said[-2000:]}")


def _python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT)]


def digest(policy: str) -> str:
    """Digest of a policy's weights and processor."""
    from tiphys.pretrain.pretrained import policy_digest

    return policy_digest(policy)


def spent(metrics: Path) -> dict[str, Any]:
    """Training steps, operations and tokens of a run. Each line of metrics stands for the steps since the line before."""
    flops = tokens = 0.0
    last = 0
    for text in metrics.read_text().splitlines():
        line = json.loads(text)
        if "flops" not in line or line["step"] <= last:  # other kinds of lines, and steps that a resumed run repeated
            continue
        flops += line["flops"] * (line["step"] - last)
        tokens += line["tokens"] * (line["step"] - last)
        last = line["step"]
    return {"steps": last, "flops": flops, "tokens": tokens}


def measure(recipe: Mapping[str, Any], steps: int = 5) -> tuple[float, float]:
    """(operations, CPU seconds of forward and backward pass) of a training step of a recipe, means over the first steps."""
    import torch

    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.dataio.placement import Home
    from tiphys.launch.plan import loader_arguments, make_plan, open_datasets
    from tiphys.pretrain.model.flops import flops_per_batch
    from tiphys.pretrain.model.inputs import to_tensors
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.pretrained import begin
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.recipes.load import from_dict

    torch.set_num_threads(1)
    whole = from_dict({"name": "measured", **recipe, "run": {"dir": "unused"}})
    indexes = open_datasets(whole)
    objectives = Objectives(whole, indexes)
    plan = make_plan(whole, indexes, objectives)
    net = begin(whole, objectives.vocabulary).train()
    flops, seconds = [], []
    with TrajectoryLoader(plan, Home(0, 1), **loader_arguments(whole, objectives), stop=steps) as loader:
        for loaded in loader:
            batch = TokenBatch.from_arrays(loaded.arrays)
            flops.append(flops_per_batch(net.config, batch))
            began = time.thread_time()
            net(to_tensors(batch), batch.targets, batch.real_tokens).loss.backward()
            seconds.append(time.thread_time() - began)
            loaded.release()
    return float(sum(flops) / steps), float(sum(seconds[1:]) / max(1, steps - 1))


def steps_for(flops: float, each: float, least: int = 50) -> int:
    """Training steps that cost this many operations."""
    return max(least, round(flops / each))


def optimizer(rows: int, rate: float = 1e-3) -> dict[str, Any]:
    """The section `deepspeed` of all recipes here: that of the quickstart with another number of rows."""
    return {
        "train_batch_size": rows,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": rate, "betas": [0.9, 0.95], "weight_decay": 0.05}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"warmup_num_steps": 50, "total_num_steps": "auto", "cos_min_ratio": 0.02},
        },
    }


def numbers(text: str) -> Sequence[int]:
    """`0,1,2` of a command line."""
    return tuple(int(word) for word in text.split(","))
