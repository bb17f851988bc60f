"""Collects datasets of demonstrations from experts. The same arguments give the same bytes on any number of processes.

In a demonstration the expert's action is executed with a disturbance, but recorded without it (Laskey et al. 2017, DART). So the
data contain states that a learner's errors lead to, with the correct action. Each episode draws its level of disturbance
uniformly between 0 and `noise`. With `record="executed"`, the recorded actions are the executed ones: then the episodes differ in
quality, and observations, rewards and returns are those of the recorded actions.

Seeds: demonstrations use seeds below SCORE_SEEDS, scores use seeds from SCORE_SEEDS on, evaluation from EVALUATION_SEEDS on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiphys.dataio import environments
from tiphys.dataio.casting import checked_cast
from tiphys.dataio.environments import Environment, Expert, ExpertLost, allow
from tiphys.dataio.environments.fitting import fitted
from tiphys.dataio.environments.modules import allowed
from tiphys.dataio.environments.workers import Workers
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.observation import observation_fields

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

SCORE_SEEDS, EVALUATION_SEEDS = 900_000, 1_000_000
LONGEST = 100_000  # steps after which an episode is truncated, even if its environment has no horizon
RECORDS = ("intended", "executed")  # which action of a demonstration is recorded
ATTEMPTS = 20  # most seeds that are tried for one episode if the expert gets lost
CHUNK = 25  # episodes in one job of the process pool

ExpertFactory = Callable[[str, Environment], Expert]  # (task, environment) -> expert; picklable
# (observation, action executed in the step before, its reward) -> (action to record, action to execute)
Act = Callable[[Any, Any, float], tuple[Any, Any]]


class EnvironmentFault(DataError):
    """An environment or an expert raised an exception. The message names the task, the seed and the step."""


class Outcome(NamedTuple):
    """The result of an episode, from which its score is computed."""

    total_return: float
    success: bool | None
    steps: int


@dataclass
class Trajectory:
    """One episode as it was played: T recorded actions and rewards, T + 1 native observations, and how it ended."""

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
    record: str = "intended",
    processes: int = 0,
    policy: ExpertFactory | None = None,
    score_episodes: int = 30,
    progress: Callable[[str, int, int], None] | None = None,
    **writer_options: Any,
) -> EpisodeIndex:
    """Collect `episodes` demonstrations of each task into one dataset.

    tasks           name or names of tasks, or a mapping from names to numbers of episodes; `module:EnvId` imports the module
    seed            the first episode's seed
    noise           largest disturbance of the executed action (see `Family.disturb`), at least 0; None: the default of the family
    record          intended: the action that the expert chose is recorded; executed: the disturbed one
    processes       0: one for each core; 1: only this process
    policy          makes the expert for a task and its environment; None: the family's own expert
    score_episodes  number of episodes that measure the random and the expert score of each task
    progress        called with (task, episodes written, episodes in total)
    writer_options  further arguments of `ShardWriter`

    Raises DataError if the arguments are not valid, UnknownEnvironment, MissingExtra, EnvironmentFault, or an error of the store.
    Then no dataset exists.
    """
    from tiphys.dataio.shards import ShardWriter

    counts = _counts(tasks, episodes)
    if noise is not None and not 0 <= noise < np.inf:
        raise DataError(f"noise {noise} is not a number of at least 0")
    if record not in RECORDS:
        raise DataError(f"record {record!r} is unknown; it is one of {', '.join(RECORDS)}")
    allow(tasks=counts)
    for task, count in counts.items():
        if seed < 0 or seed + count > SCORE_SEEDS:
            raise DataError(
                f"{task}: seeds {seed} … {seed + count - 1} must not be negative or overlap the range reserved for scoring "
                f"(from {SCORE_SEEDS}); choose another seed or fewer episodes"
            )
    with (
        Players(processes or os.cpu_count() or 1, policy) as players,
        ShardWriter(destination, **writer_options) as writer,
    ):
        for task in counts:
            spec = players.scored(environments.spec(task), score_episodes)
            writer.add_task(spec)
            for done, episode in enumerate(players.demonstrations(spec, counts[spec.name], seed, noise, record), 1):
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
            raise DataError(f"{task}: {count} episodes were asked for; at least 1 is needed")
    return counts


class Players:
    """Processes that play episodes. Each makes its environments once. Results come in the order of the jobs."""

    def __init__(self, processes: int, policy: ExpertFactory | None = None) -> None:
        self._workers = Workers(processes, _start, policy, allowed())

    def __enter__(self) -> Players:
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)

    def scored(self, spec: TaskSpec, episodes: int, *, expert: bool = True) -> TaskSpec:
        """The task with its random and its expert score: means over `episodes` episodes without disturbance.

        Without `expert` only the random score is measured.
        """
        if episodes < 1:
            raise DataError(f"{spec.name}: a score cannot be measured with {episodes} episodes; at least 1 is needed")
        seeds = range(SCORE_SEEDS, SCORE_SEEDS + episodes)
        chunks = [tuple(seeds[i : i + 5]) for i in range(0, episodes, 5)]
        players = ("random", "expert") if expert else ("random",)
        results = list(self._workers.in_order([_Scores(spec, who, chunk) for who in players for chunk in chunks]))
        found = {}
        for number, who in enumerate(players):
            mine = results[number * len(chunks) : (number + 1) * len(chunks)]
            found[who] = float(np.mean([score(spec, o) for part in mine for o in part]))
        return replace(spec, random=found["random"], expert=found.get("expert", spec.expert))

    def demonstrations(
        self, spec: TaskSpec, episodes: int, seed: int, noise: float | None, record: str = "intended"
    ) -> Iterator[Episode]:
        """`episodes` demonstrations of a task, in order."""
        if noise is None:
            noise = environments.family(spec.name).noise
        begins = range(0, episodes, CHUNK)
        jobs = [_Demonstrations(spec, seed, i, min(i + CHUNK, episodes), episodes, noise, record) for i in begins]
        for part in self._workers.in_order(jobs):
            yield from part


@dataclass(frozen=True)
class _Scores:
    spec: TaskSpec
    who: str  # random | expert
    seeds: tuple[int, ...]

    def __call__(self) -> list[Outcome]:
        task = self.spec.environment or self.spec.name
        env, limit, steps = _stage(task, self.spec.max_steps)
        outcomes = []
        for seed in self.seeds:
            if self.who == "random":
                env.action_space.seed(seed)
                trajectory = play(env, task, seed, lambda *_: (env.action_space.sample(),) * 2, limit)
            else:
                try:
                    trajectory = play(env, task, seed, _demonstrate(task, env, seed, 0.0, steps=steps), limit)
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
    episodes: int  # in total; attempt a of episode i uses the seed `seed + i + a · episodes`
    noise: float
    record: str

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
                trajectory = play(env, task, seed, _demonstrate(task, env, seed, level, self.record))
            except ExpertLost as error:
                lost = error
                continue
            info = {"seed": seed, "noise": level, "record": self.record}
            return as_episode(trajectory, self.spec, f"{task}/{seed:06d}", info=info)
        raise EnvironmentFault(
            f"task {task!r}, episode {number}: the expert got lost with every seed that was tried; the last time: {lost}"
        )


def play(env: Environment, task: str, seed: int, act: Act, limit: int = LONGEST) -> Trajectory:
    """Play one episode of at most `limit` steps.

    ExpertLost and DataError are raised unchanged, every other exception as EnvironmentFault.
    """
    steps = Trajectory()
    try:
        observation, info = env.reset(seed=seed)
        steps.observations.append(observation)
        executed, reward = None, 0.0
        while not (steps.terminated or steps.truncated):
            recorded, executed = act(observation, executed, float(reward))
            observation, reward, terminated, truncated, info = env.step(executed)
            steps.observations.append(observation)
            steps.actions.append(recorded)
            steps.rewards.append(float(reward))
            steps.terminated = bool(terminated)
            steps.truncated = bool(truncated) or len(steps.actions) >= limit
            if (reached := succeeded(info)) is not None:
                steps.success = bool(steps.success) or reached
    except (ExpertLost, DataError):
        raise
    except Exception as error:
        where = f"task {task!r}, seed {seed}, step {len(steps.actions)}"
        raise EnvironmentFault(
            f"{where}: the environment or its expert raised {type(error).__name__}: {error}"
        ) from error
    return steps


def succeeded(info: Mapping[str, Any]) -> bool | None:
    """Whether a step's `info` says that the task has succeeded, as `success` or, as in gymnasium-robotics and Stable-Baselines3,
    as `is_success`; None: it does not say."""
    reached = info.get("success", info.get("is_success"))
    return None if reached is None else bool(reached)


def _demonstrate(
    task: str, env: Environment, seed: int, noise: float, record: str = "intended", *, steps: int = 0
) -> Act:
    """How the disturbed expert acts in `env`. The expert is reset at the first call, after the environment's reset.

    steps   the third value of `_stage` that gave the environment
    """
    expert, family, rng = _expert(task, steps), environments.family(task), _generator(seed, "disturb")
    rewarded = getattr(expert, "rewarded", None)

    def act(observation: Any, taken: Any, reward: float) -> tuple[Any, Any]:
        if taken is None:
            expert.reset()
        elif rewarded is not None:
            rewarded(reward)
        action = fitted(expert.act(observation, taken), env.action_space, f"task {task!r}")
        executed = family.disturb(action, env.action_space, noise, rng) if noise else action
        return (executed if record == "executed" else action), executed

    return act


def as_episode(
    steps: Trajectory, spec: TaskSpec, id: str, *, agent: str = "expert", info: Mapping[str, Any] | None = None
) -> Episode:
    """A trajectory as an episode with the fields that the task declares.

    Raises DataError if the environment did not give a declared field, or gave it in another shape.
    """
    count = len(steps.actions)
    flags = np.zeros((2, count), bool)
    flags[0, -1:], flags[1, -1:] = steps.terminated, steps.truncated
    values: dict[str, Any] = {"reward": steps.rewards, "terminated": flags[0], "truncated": flags[1]}
    values.update(_columns([observation_fields(o) for o in steps.observations]))
    values.update(_columns([observation_fields(a, "action") for a in steps.actions]))
    fields: dict[str, Any] = {}
    advice = f"the fields of task {spec.name!r} must declare what its environment gives"
    for f in spec.fields:
        if f.name not in values:
            raise DataError(
                f"episode {id}: task {spec.name!r} declares the field {f.name!r}, but its environment did not give it"
            )
        column, where = values[f.name], f"episode {id}: field {f.name!r}"
        if f.per == "episode":
            fields[f.name] = column[0] if f.modality == "text" else checked_cast(column[0], f.dtype, where, advice)
        elif f.modality == "text":
            fields[f.name] = np.array(column, np.dtypes.StringDType())
        else:
            fields[f.name] = checked_cast(column, f.dtype, where, advice)
            if fields[f.name].shape[1:] != f.shape:
                raise DataError(
                    f"episode {id}: {f.name!r} has shape {fields[f.name].shape[1:]}, but the task declares {f.shape}"
                )
    return Episode(id, spec.name, fields, count, steps.success, agent, dict(info or {}))


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def score(spec: TaskSpec, outcome: Outcome) -> float:
    """The score of one episode; `TaskSpec.random` and `TaskSpec.expert` are means of it.

    Raises DataError if the task is scored by success, but the environment did not report it.
    """
    if spec.normalise == "return":
        return outcome.total_return
    if outcome.success is None:
        raise DataError(f"task {spec.name!r} is scored by success, but the info of its environment has no 'success'")
    return float(outcome.success)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, ("level", "disturb").index(purpose)]))


# State of a process that plays: what makes the experts; the environments and experts are cached below.
_policy: ExpertFactory | None = None


def _start(policy: ExpertFactory | None, modules: Sequence[str] = ()) -> None:
    global _policy
    _policy = policy
    allow(modules)
    _expert.cache_clear()


@cache
def _environment(task: str) -> Environment:
    return environments.make(task)


def horizon(task: str, env: Environment, steps: int) -> tuple[dict[str, Any], int]:
    """Options of `make` that let episodes last `steps`, and the most steps of an episode then.

    steps   `max_steps` of a TaskSpec; 0: the environment's own horizon
    """
    owner = environments.family(task)
    own = owner.max_steps(task, env)  # 0: the environment sets no limit
    longer = 0 < own < steps
    return owner.horizon_options(steps) if longer else {}, (steps if steps and not longer and steps != own else LONGEST)


@cache
def _stage(task: str, steps: int) -> tuple[Environment, int, int]:
    """An environment with this horizon, the most steps of an episode, and the horizon if it had to be given (else 0)."""
    env = _environment(task)
    options, limit = horizon(task, env, steps)
    return (environments.make(task, **options), limit, steps) if options else (env, limit, 0)


@cache
def _expert(task: str, steps: int = 0) -> Expert:
    return (_policy or environments.expert)(task, _stage(task, steps)[0])
