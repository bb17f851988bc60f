"""Evaluates a policy: it plays episodes in the environments of its tasks, in worker processes.

`GROUP` episodes are played together in one process, with one forward pass for each step. A group depends only on its task and its
seeds, so the result does not depend on the number of processes. The default seeds are reserved for evaluation: `collect` makes no
demonstration with them (`tiphys.dataio.collect`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio import environments
from tiphys.dataio.atomic import finite, write_json
from tiphys.dataio.collect import EVALUATION_SEEDS, horizon
from tiphys.dataio.environments import Environment
from tiphys.dataio.environments.fitting import misfits
from tiphys.dataio.environments.modules import allowed
from tiphys.dataio.environments.workers import Workers
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.paths import expand
from tiphys.pretrain.acting.ask import Ask, Asking
from tiphys.pretrain.acting.play import Played, play_group
from tiphys.pretrain.acting.scores import seen_share, summary
from tiphys.pretrain.played_groups import PlayedGroups
from tiphys.pretrain.policy_files import local_policy

if TYPE_CHECKING:
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.serving.client import RemotePolicy

GROUP = 10  # episodes that share a forward pass


def evaluate(
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    episodes: int = 40,
    seed: int = EVALUATION_SEEDS,
    processes: int = 0,
    sample: bool | None = None,
    asking: Asking | None = None,
    out: str | Path = "",
    pictures: str | Path = "",
    videos: int = 1,
    demonstrations: Sequence[str] = (),
    modules: Sequence[str] = (),
    device: str = "",
    server: str = "",
    api_key_file: str | Path = "",
    resume: str | Path = "",
) -> dict[str, Any]:
    """Play episodes of each task with a policy, and score them.

    Parameters
    ----------
    folder : str or Path
        The folder of a policy, as for `Policy.load`.
    tasks : sequence of str, optional
        Names of the tasks. None: every task of the policy that has an environment. A name ``module:EnvId`` allows its module.
    episodes : int
        Episodes of each task.
    seed : int
        Episode i is played with seed ``seed + i``. The default is the first of the reserved seeds.
    processes : int
        Number of worker processes; 0: one for each core.
    sample : bool, optional
        Draw actions from the policy's distribution instead of taking the most probable ones. None: as the policy's recipe says.
    asking : Asking, optional
        Objectives to act with, and target returns, prompts and goals, by task. None: the first objective of each task, asked for
        what the recipe says.
    out : str or Path
        JSON file for the result, written whole or not at all; "": no file.
    pictures : str or Path
        Folder for film strips of the first ``videos`` episodes of each task, ``TASK-SEED.png``; "": none.
    videos : int
        Film strips of each task.
    demonstrations : sequence of str
        Datasets that the policy was trained on. With them, the result says which share of the evaluation's states they contain.
    modules : sequence of str
        Python modules that environments named ``module:EnvId`` may import. Others are refused, because a policy or its data name
        them.
    device : str
        As for `Policy.load`.
    server : str
        ``ws://host:port`` of a `tiphys serve` that holds this policy and chooses the actions; "": this machine does. The scores
        are the same.
    api_key_file : str or Path
        File with the server's API key; "": it needs none.
    resume : str or Path
        Folder in which episodes are kept as they are played. A later call with the same policy and options goes on from them.
        "": none are kept.

    Returns
    -------
    dict
        {"tasks": {name: scores}}. `tiphys.pretrain.acting.scores.summary` lists the scores. Added are "objective"; for one that
        shows returns, "target_return" in rewards; and "pictures" and "seen_states", if they were asked for. "curve" is a list of
        the scores for each of ``asking.target_returns``, with "asked" as it was written. "objectives" has the same for the
        further objectives of the task, by name.

    Raises
    ------
    DataError
        If the policy has no such task, if a task has no environment or one whose spaces do not fit, if the policy cannot be
        asked so, or if ``episodes`` is less than 1.
    EnvironmentFault
        If an environment raises.
    ServerRefused
        If the server cannot be reached, refuses or holds another policy.
    """
    folder, out, pictures = expand(folder), expand(out), expand(pictures)
    environments.allow(modules, tasks or ())
    if "://" in str(folder):
        folder = local_policy(folder)  # once, not in each worker process
    specs, asks = _plays(folder, tasks, device, asking or Asking())
    if episodes < 1:
        raise DataError(f"cannot evaluate with {episodes} episodes; play at least 1")
    for place in (Path(out).parent if out else None, Path(pictures) if pictures else None):
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)  # before hours of playing, not after
            if not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, "the result cannot be written there", str(place))
    starts = range(seed, seed + episodes, GROUP)
    jobs = [
        _Group(number, specs[ask.task], ask, tuple(range(s, min(s + GROUP, seed + episodes))))
        for number, ask in enumerate(asks)
        for s in starts
    ]
    count = min(processes or os.cpu_count() or 1, len(jobs))
    away = _Away.of(server, str(folder), api_key_file) if server else None
    if away is not None:
        count = min(count, away.groups(str(folder)))
    played: list[list[Played]] = [[] for _ in asks]
    kept = _kept(expand(resume), str(folder), sample, device, server) if resume else None
    known = {} if kept is None else {i: group for i, job in enumerate(jobs) if (group := kept.find(job)) is not None}
    with Workers(count, _start, str(folder), sample, device, allowed(), away) as workers:
        new = workers.in_order([job for i, job in enumerate(jobs) if i not in known])
        for i, job in enumerate(jobs):
            if i in known:
                played[job.number] += known[i]
                continue
            played[job.number] += (group := next(new))
            if kept is not None:
                kept.keep(job, group)
        found = _results(specs, asks, played)
        first = {ask.task: number for number, ask in reversed(list(enumerate(asks)))}
        if pictures and videos:
            strips = [
                _Strip(specs[task], p.seed, p.actions, str(pictures))
                for task, number in first.items()
                for p in played[number][:videos]
            ]
            for strip, drawn in zip(strips, workers.in_order(strips), strict=True):
                found[strip.spec.name].setdefault("pictures", []).append(drawn)
        for task, number in first.items() if demonstrations else ():
            parts = [_Demonstrated(specs[task], tuple(demonstrations), (i, 2 * count)) for i in range(2 * count)]
            visited = [p.states for p in played[number]]
            found[task]["seen_states"] = seen_share(visited, list(workers.in_order(parts))) if len(visited[0]) else None
    result = {"tasks": found}
    if out:
        write_json(out, finite(result), indent=1)
    return result


def _kept(place: str | Path, folder: str, *how: object) -> PlayedGroups:
    from tiphys.pretrain.pretrained import policy_digest

    return PlayedGroups(Path(place), f"{policy_digest(folder)} {how}")


def _results(specs: Mapping[str, TaskSpec], asks: Sequence[Ask], played: Sequence[list[Played]]) -> dict[str, Any]:
    """Task -> scores, as `evaluate` returns them."""
    found: dict[str, Any] = {}
    places: dict[tuple[str, str], dict[str, Any]] = {}
    for ask, group in zip(asks, played, strict=True):
        scores = summary(specs[ask.task], [p.outcome for p in group])
        known = {} if ask.asked is None else {"target_return": ask.asked}
        place = places.get((ask.task, ask.objective))
        if place is not None:
            place.setdefault("curve", []).append({"asked": ask.written, **known, **scores})
            continue
        place = places[ask.task, ask.objective] = {"objective": ask.objective, **known, **scores}
        if ask.task not in found:
            found[ask.task] = place
        else:
            found[ask.task].setdefault("objectives", {})[ask.objective] = place
    return found


def _plays(
    folder: str | Path, tasks: Sequence[str] | None, device: str, asking: Asking
) -> tuple[dict[str, TaskSpec], list[Ask]]:
    """The tasks to play, and what is asked in them. Both are checked before any process starts."""
    from tiphys.pretrain.acting.load import check_device
    from tiphys.pretrain.acting.policy import Policy

    check_device(device)
    policy = Policy.load(folder, "cpu")
    known = {name: policy.processor.tasks[name] for name in policy.tasks}
    names = list(tasks or [n for n, s in known.items() if s.environment])
    if not names:
        raise DataError(
            f"{folder}: none of the policy's tasks has an environment; its tasks are {', '.join(known) or 'none'}. Name one with "
            "`environment` in a mapping file, convert with it and train; docs/converting.md shows how"
        )
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{folder}: the policy has no task {name!r}; its tasks are {', '.join(known)}{hint}")
        if not known[name].environment:
            raise DataError(f"{folder}: task {name!r} has no environment to act in")
        environments.family(known[name].environment)
    return {name: known[name] for name in names}, asking.asks(policy.processor, list(dict.fromkeys(names)))


@dataclass(frozen=True)
class _Group:
    number: int  # of the Ask
    spec: TaskSpec
    ask: Ask
    seeds: tuple[int, ...]

    def __call__(self) -> list[Played]:
        assert _policy is not None
        stage = _stage(self.spec)
        problems = list(
            misfits(self.spec, _policy.processor.used_fields(self.spec.name, self.ask.objective), stage.declared)
        )
        if problems:
            raise DataError("; ".join(problems))
        envs = stage.environments(len(self.seeds))
        try:
            return play_group(_policy, self.spec, envs, self.seeds, stage.limit, stage.declared, self.ask)
        finally:
            if _away is not None:
                _policy.close()  # type: ignore[union-attr]


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
        except Exception as error:  # no display, no EGL, no pygame: the scores are valid without pictures
            return {"seed": self.seed, "error": f"{type(error).__name__}: {error}"}
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        strip.save(Path(self.folder) / name)
        return {"seed": self.seed, "file": name}


@dataclass(frozen=True)
class _Demonstrated:
    """The states of every n-th episode of a task in the demonstrations. `part` is (i, n)."""

    spec: TaskSpec
    datasets: tuple[str, ...]
    part: tuple[int, int]

    def __call__(self) -> np.ndarray:
        from tiphys.pretrain.acting.states import demonstrated_states

        return demonstrated_states(self.spec, self.datasets, self.part)


@dataclass(frozen=True)
class _Away:
    """A server that holds the policy."""

    url: str
    api_key: str = field(repr=False)
    digest: str

    @classmethod
    def of(cls, url: str, folder: str, api_key_file: str | Path) -> _Away:
        from tiphys.pretrain.pretrained import policy_digest
        from tiphys.pretrain.serving.server import read_key

        return cls(url, read_key(expand(api_key_file)) if api_key_file else "", policy_digest(folder))

    def policy(self, folder: str, sample: bool | None) -> RemotePolicy:
        from tiphys.pretrain.serving.client import RemotePolicy

        return RemotePolicy.of(folder, self.url, api_key=self.api_key, digest=self.digest, sample=sample)

    def groups(self, folder: str) -> int:
        """How many groups of episodes it takes at once."""
        sessions = self.policy(folder, False).sessions()
        if sessions < GROUP:
            raise DataError(
                f"{self.url}: the server takes {sessions} sessions; start it with --sessions {GROUP} or more"
            )
        return sessions // GROUP


# The policy of a worker process.
_policy: Policy | RemotePolicy | None = None
_away: _Away | None = None


def _start(
    folder: str, sample: bool | None, device: str, modules: Sequence[str] = (), away: _Away | None = None
) -> None:
    global _policy, _away
    _away = away
    if away is not None:
        environments.allow(modules)
        _policy = away.policy(folder, sample)
        return
    import torch

    from tiphys.pretrain.acting.policy import Policy

    environments.allow(modules)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the worker processes share the cores
    _policy = Policy.load(folder, device, sample=sample)


class _Stage:
    """The environments of a task that this process has made so far.

    limit     most steps of an episode
    declared  the fields of the environments
    """

    def __init__(self, spec: TaskSpec) -> None:
        self._name = spec.environment
        env = environments.make(self._name)
        self.declared = environments.family(self._name).fields(self._name, env)
        self._options, self.limit = horizon(self._name, env, spec.max_steps)
        self._made = [] if self._options else [env]

    def environments(self, count: int) -> list[Environment]:
        while len(self._made) < count:
            self._made.append(environments.make(self._name, **self._options))
        return self._made[:count]


@cache
def _stage(spec: TaskSpec) -> _Stage:
    return _Stage(spec)
