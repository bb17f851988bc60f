"""Toy worlds: groups of environments that step together, and episodes that simple behaviours record in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec, Window
from tiphys.pretrain.acting.policy import Policy

Behaviour = Callable[[Mapping[str, np.ndarray], int], np.ndarray]  # fields [n, …] of the n worlds, step -> actions [n]


class World(Protocol):
    """n environments of one task whose episodes have the same number of steps.

    Attributes
    ----------
    task : TaskSpec
        Its fields. It has one action field, `action`.
    steps : int
        Steps of an episode.
    """

    task: TaskSpec
    steps: int

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        """Begin n episodes. Returns the fields of the first observations, [n, *shape]."""
        ...

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Act in all n. Returns the next observations, and rewards [n]."""
        ...


@dataclass
class Played:
    """n episodes of T steps.

    Attributes
    ----------
    fields : dict of str to ndarray
        The observations, [n, T + 1, *shape].
    actions, rewards : ndarray [n, T]
        What was done, and earned.
    """

    fields: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray

    @property
    def returns(self) -> np.ndarray:
        """[n] the sum of rewards of each episode."""
        return self.rewards.sum(1)

    def episodes(self, task: TaskSpec, name: str, texts: Mapping[str, Sequence[str]] | None = None) -> list[Episode]:
        """As episodes of a dataset, with ids `name-0`, `name-1`, …; `texts`: the fields that each episode has once."""
        out = []
        for i in range(len(self.actions)):
            fields: dict[str, Any] = {k: v[i] for k, v in self.fields.items()}
            fields |= {k: v[i] for k, v in (texts or {}).items()}
            fields |= {"action": self.actions[i], "reward": self.rewards[i].astype(np.float32)}
            fields = {spec.name: fields[spec.name] for spec in task.fields}
            out.append(Episode(f"{name}-{i}", task.name, fields, self.actions.shape[1]))
        return out

    def window(self, i: int, steps: int = 0) -> Window:
        """The last steps of episode i (0: all), as a demonstration that `Policy.reset` takes as a prompt."""
        last = self.actions.shape[1]
        first = last - (steps or last)
        here = slice(first, last)
        to_go = np.cumsum(self.rewards[i][::-1])[::-1].astype(np.float32)
        return Window(
            entry=0,
            task=0,
            episode=str(i),
            start=first,
            steps=last - first,
            episode_steps=last,
            fields={k: v[i, here] for k, v in self.fields.items()} | {"action": self.actions[i, here]},
            step=np.arange(first, last),
            returns_to_go=to_go[here],
            valid=np.ones(last - first, bool),
        )

    def with_rewards_of(self, order: np.ndarray) -> Played:
        """The same with the rewards of other episodes, so that returns tell nothing about actions."""
        return replace(self, rewards=self.rewards[order])


def behave(world: World, n: int, seed: int, behaviour: Callable[[np.random.Generator], Behaviour]) -> Played:
    """n episodes of a behaviour, which is made from a generator of its own."""
    random = np.random.default_rng([seed, 1])
    return _episodes(world, n, random, behaviour(np.random.default_rng([seed, 2])))


def play(
    policy: Policy,
    world: World,
    n: int,
    seed: int,
    *,
    rewards: bool = True,
    asked: Sequence[float] | np.ndarray | None = None,
    **reset: Any,
) -> Played:
    """n episodes of a policy.

    Parameters
    ----------
    policy : Policy
        The policy.
    world : World
        Where it acts.
    n : int
        Number of episodes, which are played at once.
    seed : int
        Seed of the world.
    rewards : bool
        False: the policy is not told its rewards.
    asked : sequence of float, optional
        The return that is asked for in each episode.
    **reset
        Arguments of `Policy.reset`.
    """
    policy.reset(world.task.name, n, **reset)
    for i, target in enumerate(asked if asked is not None else ()):
        policy.restart(i, target_return=float(target))
    earned: list[np.ndarray] = []

    def act(fields: Mapping[str, np.ndarray], step: int) -> np.ndarray:
        observations = [{k: v[i] for k, v in fields.items()} for i in range(n)]
        last = earned[-1].tolist() if earned and rewards else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that rewards are missing is the point of a control
            return np.array(policy.act(observations, last))

    return _episodes(world, n, np.random.default_rng([seed, 3]), act, earned)


def _episodes(
    world: World, n: int, random: np.random.Generator, act: Behaviour, earned: list[np.ndarray] | None = None
) -> Played:
    seen = [world.reset(n, random)]
    actions: list[np.ndarray] = []
    earned = [] if earned is None else earned
    for step in range(world.steps):
        actions.append(act(seen[-1], step))
        fields, rewards = world.step(actions[-1])
        seen.append(fields)
        earned.append(rewards)
    fields = {k: np.stack([s[k] for s in seen], 1) for k in seen[0]}
    return Played(fields, np.stack(actions, 1), np.stack(earned, 1))


def discrete(name: str, role: str, values: int, **more: Any) -> FieldSpec:
    """A field that holds one of a number of values."""
    return FieldSpec(name, role, "discrete", "int64", values=values, **more)


REWARD = FieldSpec("reward", "reward", "continuous", "float32")


class Chain:
    """A reward of 1 for each action 1, and of 0 for each action 0. The observation is the number of the step."""

    def __init__(self, steps: int = 10, name: str = "chain") -> None:
        self.steps = steps
        fields = (discrete("observation", "observation", steps + 1), discrete("action", "action", 2), REWARD)
        self.task = TaskSpec(name, fields)

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        self.at = np.zeros(n, np.int64)
        return {"observation": self.at}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        self.at = self.at + 1
        return {"observation": self.at}, actions.astype(np.float64)


class WaitOrTake:
    """To take (1) earns 1, and nothing more can be earned. To wait (0) at every step earns 10 with the last one.

    The observation is the number of the step, or, once something was taken, the number of steps and one more.
    """

    def __init__(self, steps: int = 6) -> None:
        self.steps = steps
        fields = (discrete("observation", "observation", steps + 2), discrete("action", "action", 2), REWARD)
        self.task = TaskSpec("wait-or-take", fields)

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        self.at, self.taken = 0, np.zeros(n, bool)
        return {"observation": np.zeros(n, np.int64)}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        takes = (actions == 1) & ~self.taken
        self.taken, self.at = self.taken | takes, self.at + 1
        waited = 10.0 * (~self.taken & (self.at == self.steps))
        return {"observation": np.where(self.taken, self.steps + 1, self.at)}, takes + waited


def competent(power: float = 1.0) -> Callable[[np.random.Generator], Behaviour]:
    """Takes action 1 with a probability that is drawn for each episode: uniform^power."""

    def make(random: np.random.Generator) -> Behaviour:
        skill = np.zeros(0)

        def act(fields: Mapping[str, np.ndarray], step: int) -> np.ndarray:
            nonlocal skill
            n = len(fields["observation"])
            if step == 0:
                skill = random.random(n) ** power
            return (random.random(n) < skill).astype(np.int64)

        return act

    return make


class Goal:
    """A reward of 1 for each action that equals the goal, which no observation tells. Each goal is a task of its own."""

    def __init__(self, goal: int, goals: int = 6, steps: int = 5) -> None:
        self.goal, self.goals, self.steps = goal, goals, steps
        fields = (discrete("observation", "observation", 4), discrete("action", "action", goals), REWARD)
        self.task = TaskSpec(f"goal-{goal}", fields)

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        self.random = random
        return {"observation": random.integers(0, 4, n)}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return {"observation": self.random.integers(0, 4, len(actions))}, (actions == self.goal).astype(np.float64)

    def expert(self, random: np.random.Generator) -> Behaviour:
        """Always takes the action that is the goal."""
        return lambda fields, step: np.full(len(fields["observation"]), self.goal)


class Cued:
    """A reward of 1 for each action that equals the cue of the step before; at the first step, for the action 0.

    A cue is drawn anew at each step. `rewarded`: the task has rewards.
    """

    def __init__(self, steps: int = 10, values: int = 12, rewarded: bool = True) -> None:
        self.steps, self.values = steps, values
        fields = [discrete("observation", "observation", values), discrete("action", "action", values)]
        self.task = TaskSpec("cued", tuple([*fields, REWARD] if rewarded else fields))

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        self.random = random
        self.wanted, self.cue = np.zeros(n, np.int64), random.integers(0, self.values, n)
        return {"observation": self.cue}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        earned = (actions == self.wanted).astype(np.float64)
        self.wanted, self.cue = self.cue, self.random.integers(0, self.values, len(actions))
        return {"observation": self.cue}, earned

    def competent(self, random: np.random.Generator) -> Behaviour:
        """Does what is wanted with a probability that is drawn for each episode."""
        skill = np.zeros(0)

        def act(fields: Mapping[str, np.ndarray], step: int) -> np.ndarray:
            nonlocal skill
            n = len(self.wanted)
            if step == 0:
                skill = random.random(n)
            other = (self.wanted + random.integers(1, self.values, n)) % self.values
            return np.where(random.random(n) < skill, self.wanted, other)

        return act


class Told:
    """As `Goal`, but each episode has a goal of its own, which only its instruction tells."""

    WORDS = ("red", "green", "blue", "grey", "purple", "yellow")

    def __init__(self, goals: np.ndarray, steps: int = 5) -> None:
        self.goals, self.steps = goals, steps
        mission = FieldSpec("mission", "text", "text", "str", per="episode")
        count = len(self.WORDS)
        fields = (discrete("observation", "observation", 4), discrete("action", "action", count), REWARD, mission)
        self.task = TaskSpec("told", fields)

    @property
    def missions(self) -> list[str]:
        """The instruction of each episode."""
        return [f"go to the {self.WORDS[goal]} ball" for goal in self.goals]

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        self.random = random
        return {"observation": random.integers(0, 4, n)}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return {"observation": self.random.integers(0, 4, len(actions))}, (actions == self.goals).astype(np.float64)

    def expert(self, random: np.random.Generator) -> Behaviour:
        """Does what the instruction says."""
        return lambda fields, step: self.goals


class Choice:
    """Three actions, of which none is rewarded. The observation is the number of the step, or the last action."""

    def __init__(self, steps: int = 9, values: int = 3, shows_actions: bool = False) -> None:
        self.steps, self.values, self.shows_actions = steps, values, shows_actions
        fields = (discrete("observation", "observation", steps + 1), discrete("action", "action", values), REWARD)
        self.task = TaskSpec("choice", fields)

    def reset(self, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        self.at = np.zeros(n, np.int64)
        return {"observation": self.at}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        self.at = actions + 1 if self.shows_actions else self.at + 1
        return {"observation": self.at}, np.zeros(len(actions))

    def habitual(self, random: np.random.Generator) -> Behaviour:
        """Takes each action with a probability that is drawn for each episode."""
        habit = np.zeros((0, self.values))

        def act(fields: Mapping[str, np.ndarray], step: int) -> np.ndarray:
            nonlocal habit
            if step == 0:
                habit = random.dirichlet(np.ones(self.values), len(fields["observation"]))
            return (habit.cumsum(1) < random.random((len(habit), 1))).sum(1).clip(max=self.values - 1)

        return act
