"""How well a policy acts: episodes in its tasks' environments, in processes of their own.

Episodes play in groups of `GROUP`, side by side in one process and in one forward pass a step. A group follows from its task and
its seeds alone, so the result does not depend on the number of processes. Seeds start where no demonstration reaches
(`tiphys.dataio.collect`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio import environments
from tiphys.dataio.atomic import finite, write_json
from tiphys.dataio.collect import EVALUATION_SEEDS
from tiphys.dataio.environments import Environment
from tiphys.dataio.environments.workers import Workers
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.pretrain.acting.play import Played, play_group
from tiphys.pretrain.acting.scores import seen_share, summary

if TYPE_CHECKING:
    from tiphys.pretrain.acting.policy import Policy

GROUP = 10  # episodes that one forward pass serves


def evaluate(
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    episodes: int = 40,
    seed: int = EVALUATION_SEEDS,
    processes: int = 0,
    sample: bool = False,
    out: str | Path = "",
    pictures: str | Path = "",
    videos: int = 1,
    demonstrations: Sequence[str] = (),
    device: str = "",
) -> dict[str, Any]:
    """Play `episodes` episodes of each task and score them.

    folder          a policy (`Policy.load`)
    tasks           None: every task of the policy that has an environment
    seed            episode i plays seed + i
    processes       0: as many as cores
    sample          draw actions instead of taking the most probable
    out             file for the result, written whole or not at all
    pictures        folder for the first `videos` episodes of each task as film strips, `TASK-SEED.png`
    demonstrations  datasets that the policy learned from: says what share of the evaluation's states they contain

    Returns {"tasks": {name: see `summary`}}. Raises DataError for a task that the policy does not know or that has no
    environment, and what environments raise.
    """
    specs = _specs(folder, tasks)
    if episodes < 1:
        raise DataError(f"{episodes} episodes cannot measure anything; at least 1 is needed")
    starts = range(seed, seed + episodes, GROUP)
    jobs = [_Group(spec, tuple(range(s, min(s + GROUP, seed + episodes)))) for spec in specs for s in starts]
    count = min(processes or os.cpu_count() or 1, len(jobs))
    played: dict[str, list[Played]] = {spec.name: [] for spec in specs}
    with Workers(count, _start, str(folder), sample, device) as workers:
        for job, group in zip(jobs, workers.in_order(jobs), strict=True):
            played[job.spec.name] += group
        found = {spec.name: summary(spec, [p.outcome for p in played[spec.name]]) for spec in specs}
        if pictures and videos:
            strips = [
                _Strip(spec, p.seed, p.actions, str(pictures)) for spec in specs for p in played[spec.name][:videos]
            ]
            for strip, drawn in zip(strips, workers.in_order(strips), strict=True):
                found[strip.spec.name].setdefault("pictures", []).append(drawn)
        for spec in specs if demonstrations else ():
            parts = [_Demonstrated(spec, tuple(demonstrations), (i, 2 * count)) for i in range(2 * count)]
            visited = [p.states for p in played[spec.name]]
            found[spec.name]["seen_states"] = (
                seen_share(visited, list(workers.in_order(parts))) if len(visited[0]) else None
            )
    result = {"tasks": found}
    if out:
        write_json(out, finite(result), indent=1)
    return result


def _specs(folder: str | Path, tasks: Sequence[str] | None) -> list[TaskSpec]:
    """The tasks to play, checked before any process starts."""
    from tiphys.pretrain.acting.policy import Policy

    policy = Policy.load(folder, "cpu")
    known = {name: policy.processor.tasks[name] for name in policy.tasks}
    names = list(tasks or [n for n, s in known.items() if s.environment])
    if not names:
        raise DataError(
            f"{folder}: none of this policy's tasks has an environment ({', '.join(known) or 'it has no task'})"
        )
    for name in names:
        if name not in known:
            raise DataError(f"{folder}: this policy knows no task {name!r}; it knows {', '.join(known)}")
        if not known[name].environment:
            raise DataError(f"{folder}: task {name!r} has no environment to act in")
        environments.family(known[name].environment)
    return [known[name] for name in names]


@dataclass(frozen=True)
class _Group:
    spec: TaskSpec
    seeds: tuple[int, ...]

    def __call__(self) -> list[Played]:
        assert _policy is not None
        made = _environments(self.spec.environment)
        while len(made) < len(self.seeds):
            made.append(environments.make(self.spec.environment))
        return play_group(_policy, self.spec, made[: len(self.seeds)], self.seeds)


@dataclass(frozen=True)
class _Strip:
    spec: TaskSpec
    seed: int
    actions: list[Any]
    folder: str

    def __call__(self) -> dict[str, Any]:
        from tiphys.pretrain.acting.states import film_strip

        name = f"{self.spec.name.replace('/', '_')}-{self.seed}.png"
        try:
            strip = film_strip(self.spec.environment, self.seed, self.actions)
        except Exception as error:  # no display and no EGL, no pygame: the scores stand all the same
            return {"seed": self.seed, "error": f"{type(error).__name__}: {error}"}
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        strip.save(Path(self.folder) / name)
        return {"seed": self.seed, "file": name}


@dataclass(frozen=True)
class _Demonstrated:
    """The states of every n-th episode of a task in the demonstrations."""

    spec: TaskSpec
    datasets: tuple[str, ...]
    part: tuple[int, int]

    def __call__(self) -> np.ndarray:
        from tiphys.pretrain.acting.states import demonstrated_states

        return demonstrated_states(self.spec, self.datasets, self.part)


# What an evaluating process keeps.
_policy: Policy | None = None


def _start(folder: str, sample: bool, device: str) -> None:
    global _policy
    import torch

    from tiphys.pretrain.acting.policy import Policy

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # processes share the cores
    _policy = Policy.load(folder, device, sample=sample)


@cache
def _environments(task: str) -> list[Environment]:
    """The environments of a task that this process has made so far."""
    return []
