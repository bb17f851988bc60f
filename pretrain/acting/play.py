"""A policy plays episodes in a group of environments, with one forward pass for each step of the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.collect import LONGEST, EnvironmentFault, Outcome, succeeded
from tiphys.dataio.environments import Environment, Expert
from tiphys.dataio.environments.fitting import fitted
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.acting.ask import Ask, Asking

if TYPE_CHECKING:
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.serving.client import RemotePolicy


@dataclass
class Played:
    """One episode: its outcome, its actions (to draw it again), and hashes of its states, if `state_hash` has any."""

    seed: int
    outcome: Outcome
    actions: list[Any]
    states: np.ndarray


@dataclass
class _Playing:
    seed: int
    env: Environment
    observation: Any
    reward: float = 0.0
    rewards: list[float] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    success: bool | None = None
    done: bool = False

    def step(self, action: Any, limit: int) -> None:
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.reward = float(reward)
        self.rewards.append(self.reward)
        self.actions.append(action)
        if (reached := succeeded(info)) is not None:
            self.success = bool(self.success) or reached
        self.done = bool(terminated or truncated) or len(self.actions) >= limit

    @property
    def outcome(self) -> Outcome:
        return Outcome(float(np.sum(self.rewards, dtype=np.float64)), self.success, len(self.actions))


def play_group(
    policy: Policy | RemotePolicy,
    spec: TaskSpec,
    envs: Sequence[Environment],
    seeds: Sequence[int],
    limit: int = LONGEST,
    declared: Sequence[FieldSpec] = (),
    ask: Ask | None = None,
) -> list[Played]:
    """Play one episode in each environment. All step together; an environment whose episode has ended leaves the batch.

    limit     most steps of an episode
    declared  the fields of the environments, if the policy shall answer only values that they take
    ask       what the policy is asked for; None: what the recipe says

    Raises EnvironmentFault if an environment raises, DataError if an action does not fit.
    """
    from tiphys.pretrain.acting.states import state_hash

    (ask or Ask(spec.name)).reset(policy, len(seeds))
    policy.limit(declared)
    hashed = state_hash(spec)
    playing = []
    for i, (env, seed) in enumerate(zip(envs, seeds, strict=True)):
        policy.restart(i, stream=seed)
        playing.append(_Playing(seed, env, _guarded(spec, seed, 0, partial(env.reset, seed=seed))[0]))
    active = list(range(len(playing)))
    while active:
        now = [playing[i] for i in active]
        for p in now if hashed else ():
            p.states.append(hashed(p.observation))  # type: ignore[misc]
        actions = policy.act([p.observation for p in now], [p.reward for p in now], active)
        for p, action in zip(now, actions, strict=True):
            action = fitted(action, getattr(p.env, "action_space", None), f"task {spec.name!r}")
            _guarded(spec, p.seed, len(p.actions), p.step, action, limit)
        active = [i for i in active if not playing[i].done]
    return [Played(p.seed, p.outcome, p.actions, np.array(p.states, np.uint64)) for p in playing]


def _guarded(spec: TaskSpec, seed: int, step: int, call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        where = f"task {spec.name!r}, seed {seed}, step {step}"
        raise EnvironmentFault(f"{where}: the environment raised {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class PolicyExpert:
    """The policy of a folder as the expert of `tiphys.dataio.collect`.

    asking  what it is asked for; with several objectives, the first that a task was trained with
    """

    folder: str
    asking: Asking = field(default_factory=Asking)

    def __call__(self, task: str, env: Environment) -> Expert:
        from tiphys.pretrain.acting.policy import Policy

        policy = Policy.load(self.folder)
        if task not in policy.tasks:
            raise DataError(f"{self.folder}: the policy has no task {task!r}; its tasks are {', '.join(policy.tasks)}")
        ask = self.asking.asks(policy.processor, [task])[0]

        class PolicyActor:
            reward: float | None = None

            def reset(self) -> None:
                ask.reset(policy)
                self.reward = None

            def rewarded(self, reward: float) -> None:
                self.reward = reward

            def act(self, observation: Any, taken: Any = None) -> Any:
                return policy.act(observation, self.reward)

        return PolicyActor()
