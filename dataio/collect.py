"""Experts in environments -> a dataset of demonstrations. The same arguments give the same bytes on any number of processes.

A demonstration executes the expert's action plus a disturbance and records the action without it (Laskey et al. 2017, DART): a
learner then sees the states that its own errors lead to, with what to do there. Each episode draws its level of disturbance
uniformly between 0 and `noise`. With noise 0 the recorded actions are those that led to the next observation.

Seeds: demonstrations use [seed, …) below SCORE_SEEDS, scores those from there on, evaluation those from EVALUATION_SEEDS on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiphys.dataio import environments
from tiphys.dataio.environments import Environment, Expert, ExpertLost
from tiphys.dataio.environments.workers import Workers
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.observation import observation_fields

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

SCORE_SEEDS, EVALUATION_SEEDS = 900_000, 1_000_000
LONGEST = 100_000  # steps after which an environment without a horizon is cut off
ATTEMPTS = 20  # seeds tried for one episode whose expert gets lost
CHUNK = 25  # episodes of a job of the process pool

ExpertFactory = Callable[[str, Environment], Expert]  # (task, environment) -> expert; picklable
Act = Callable[
    [Any, Any], tuple[Any, Any]
]  # (observation, action executed before) -> (action recorded, action executed)


class EnvironmentFault(DataError):
    """An environment or an expert raised. The message names the task, the seed and the step."""


class Outcome(NamedTuple):
    """What a score needs of an episode."""

    total_return: float
    success: bool | None
    steps: int


@dataclass
class Trajectory:
    """One episode as it was played: T recorded actions, rewards and flags, T + 1 native observations."""

    observations: list[Any] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None

    @property
    def outcome(self) -> Outcome:
        return Outcome(float(np.sum(self.rewards, dtype=np.float64)), self.success, len(self.actions))


def collect(
    tasks: str | Sequence[str] | Mapping[str, int],
    destination: str,
    episodes: int = 1000,
    *,
    seed: int = 0,
    noise: float | None = None,
    processes: int = 0,
    policy: ExpertFactory | None = None,
    score_episodes: int = 30,
    progress: Callable[[str, int, int], None] | None = None,
    **writer_options: Any,
) -> EpisodeIndex:
    """Collect `episodes` demonstrations of each task into one dataset; a mapping gives each task its own number.

    noise           disturbance of the executed action (see `Family.disturb`); None: the family's own
    processes       0: as many as cores; 1: this one
    policy          makes the expert for a task and its environment; None: the family's own expert
    score_episodes  episodes that measure the random and the expert score of each task
    progress        called with (task, episodes written, episodes asked for)

    Raises UnknownEnvironment, MissingExtra, EnvironmentFault, or what the store raises; no dataset exists then.
    """
    from tiphys.dataio.shards import ShardWriter

    counts = _counts(tasks, episodes)
    for task, count in counts.items():
        if seed < 0 or seed + count > SCORE_SEEDS:
            raise DataError(
                f"{task}: seeds {seed} … {seed + count - 1} reach those kept for scores (from {SCORE_SEEDS})"
            )
    with (
        Players(processes or os.cpu_count() or 1, policy) as players,
        ShardWriter(destination, **writer_options) as writer,
    ):
        for task in counts:
            spec = players.scored(environments.spec(task), score_episodes)
            writer.add_task(spec)
            for done, episode in enumerate(players.demonstrations(spec, counts[spec.name], seed, noise), 1):
                writer.write(episode)
                if progress and (done % CHUNK == 0 or done == counts[spec.name]):
                    progress(spec.name, done, counts[spec.name])
        return writer.close()


def _counts(tasks: str | Sequence[str] | Mapping[str, int], episodes: int) -> dict[str, int]:
    if isinstance(tasks, Mapping):
        counts = dict(tasks)
    else:
        counts = dict.fromkeys([tasks] if isinstance(tasks, str) else tasks, episodes)
    if not counts:
        raise DataError("no task to collect")
    for task, count in counts.items():
        if count < 1:
            raise DataError(f"{task}: {count} episodes; at least 1 is needed")
    return counts


class Players:
    """Processes that play episodes, each with environments made once. Results come in the order of the jobs."""

    def __init__(self, processes: int, policy: ExpertFactory | None = None) -> None:
        self._workers = Workers(processes, _start, policy)

    def __enter__(self) -> Players:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()

    def scored(self, spec: TaskSpec, episodes: int) -> TaskSpec:
        """The task with its random and its expert score, each the mean over `episodes` undisturbed episodes."""
        if episodes < 1:
            raise DataError(f"{spec.name}: {episodes} episodes cannot measure a score")
        seeds = range(SCORE_SEEDS, SCORE_SEEDS + episodes)
        chunks = [tuple(seeds[i : i + 5]) for i in range(0, episodes, 5)]
        jobs = [_Scores(spec, who, chunk) for who in ("random", "expert") for chunk in chunks]
        results = list(self._workers.in_order(jobs))
        rows = [
            [score(spec, o) for part in half for o in part] for half in (results[: len(chunks)], results[len(chunks) :])
        ]
        return replace(spec, random=float(np.mean(rows[0])), expert=float(np.mean(rows[1])))

    def demonstrations(self, spec: TaskSpec, episodes: int, seed: int, noise: float | None) -> Iterator[Episode]:
        if noise is None:
            noise = environments.family(spec.name).noise
        ends = range(0, episodes, CHUNK)
        jobs = [_Demonstrations(spec, seed, i, min(i + CHUNK, episodes), episodes, noise) for i in ends]
        for part in self._workers.in_order(jobs):
            yield from part


@dataclass(frozen=True)
class _Scores:
    spec: TaskSpec
    who: str  # random | expert
    seeds: tuple[int, ...]

    def __call__(self) -> list[Outcome]:
        task = self.spec.name
        env = _environment(task)
        outcomes = []
        for seed in self.seeds:
            if self.who == "random":
                env.action_space.seed(seed)
                trajectory = play(env, task, seed, lambda observation, taken: (env.action_space.sample(),) * 2)
            else:
                try:
                    trajectory = play(env, task, seed, _demonstrate(task, env, seed, 0.0))
                except ExpertLost:
                    trajectory = Trajectory(success=False)
            outcomes.append(trajectory.outcome)
        return outcomes


@dataclass(frozen=True)
class _Demonstrations:
    spec: TaskSpec
    seed: int
    begin: int
    end: int
    episodes: int  # in all; attempt a of episode i plays seed + i + a · episodes
    noise: float

    def __call__(self) -> list[Episode]:
        return [self._episode(i) for i in range(self.begin, self.end)]

    def _episode(self, number: int) -> Episode:
        task = self.spec.name
        env = _environment(task)
        lost: ExpertLost | None = None
        for attempt in range(ATTEMPTS):
            seed = self.seed + number + attempt * self.episodes
            if seed >= SCORE_SEEDS:
                break
            level = float(_generator(seed, "level").uniform(0, self.noise))
            try:
                trajectory = play(env, task, seed, _demonstrate(task, env, seed, level))
            except ExpertLost as error:
                lost = error
                continue
            return as_episode(trajectory, self.spec, f"{task}/{seed:06d}", info={"seed": seed, "noise": level})
        raise EnvironmentFault(
            f"task {task!r}, episode {number}: the expert got lost on every seed tried; the last time: {lost}"
        )


def play(env: Environment, task: str, seed: int, act: Act) -> Trajectory:
    """One episode. Raises ExpertLost as it is, and everything else as EnvironmentFault."""
    steps = Trajectory()
    try:
        observation, info = env.reset(seed=seed)
        steps.observations.append(observation)
        executed = None
        while not (steps.terminated or steps.truncated):
            recorded, executed = act(observation, executed)
            observation, reward, terminated, truncated, info = env.step(executed)
            steps.observations.append(observation)
            steps.actions.append(recorded)
            steps.rewards.append(float(reward))
            steps.terminated = bool(terminated)
            steps.truncated = bool(truncated) or len(steps.actions) >= LONGEST
            if "success" in info:
                steps.success = bool(steps.success) or bool(info["success"])
    except (ExpertLost, DataError):
        raise
    except Exception as error:
        where = f"task {task!r}, seed {seed}, step {len(steps.actions)}"
        raise EnvironmentFault(
            f"{where}: the environment or its expert raised {type(error).__name__}: {error}"
        ) from error
    return steps


def _demonstrate(task: str, env: Environment, seed: int, noise: float) -> Act:
    """The expert in `env`, disturbed. It is reset at the first call, which follows the environment's reset."""
    expert, family, rng = _expert(task), environments.family(task), _generator(seed, "disturb")

    def act(observation: Any, taken: Any) -> tuple[Any, Any]:
        if taken is None:
            expert.reset()
        action = expert.act(observation, taken)
        return action, (family.disturb(action, env.action_space, noise, rng) if noise else action)

    return act


def as_episode(
    steps: Trajectory, spec: TaskSpec, id: str, *, agent: str = "expert", info: Mapping[str, Any] | None = None
) -> Episode:
    """A trajectory as the fields that the task declares. Raises DataError where the environment gives anything else."""
    count = len(steps.actions)
    flags = np.zeros((2, count), bool)
    flags[0, -1:], flags[1, -1:] = steps.terminated, steps.truncated
    values: dict[str, Any] = {"reward": steps.rewards, "terminated": flags[0], "truncated": flags[1]}
    values.update(_columns([observation_fields(o) for o in steps.observations]))
    values.update(_columns([observation_fields(a, "action") for a in steps.actions]))
    fields: dict[str, Any] = {}
    for f in spec.fields:
        if f.name not in values:
            raise DataError(f"episode {id}: task {spec.name!r} declares {f.name!r}, which its environment did not give")
        column = values[f.name]
        if f.per == "episode":
            fields[f.name] = column[0] if f.modality == "text" else np.asarray(column[0], f.dtype)
        elif f.modality == "text":
            fields[f.name] = np.array(column, np.dtypes.StringDType())
        else:
            fields[f.name] = np.asarray(column, f.dtype)
            if fields[f.name].shape[1:] != f.shape:
                raise DataError(f"episode {id}: {f.name!r} has shape {fields[f.name].shape[1:]}, declared is {f.shape}")
    return Episode(id, spec.name, fields, count, steps.success, agent, dict(info or {}))


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def score(spec: TaskSpec, outcome: Outcome) -> float:
    """What `TaskSpec.random` and `TaskSpec.expert` are means of. Raises DataError where a task never tells success."""
    if spec.normalise == "return":
        return outcome.total_return
    if outcome.success is None:
        raise DataError(f"task {spec.name!r} is scored by success, but its environment's info has no 'success'")
    return float(outcome.success)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, ("level", "disturb").index(purpose)]))


# What a playing process keeps: its environments and experts, and who makes the experts.
_policy: ExpertFactory | None = None


def _start(policy: ExpertFactory | None) -> None:
    global _policy
    _policy = policy
    _expert.cache_clear()


@cache
def _environment(task: str) -> Environment:
    return environments.make(task)


@cache
def _expert(task: str) -> Expert:
    return (_policy or environments.expert)(task, _environment(task))
