"""`Family`, the interface of a family of environments: environments, fields, experts, and how demonstrations are disturbed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from tiphys.dataio.bounds import compact, integer_range
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec


class Environment(Protocol):
    """An environment of gymnasium's interface. Its info has `success` if the task can succeed."""

    observation_space: Any
    action_space: Any

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...
    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]: ...
    def render(self) -> Any: ...
    def close(self) -> None: ...


class Expert(Protocol):
    """Acts in one environment, whose internal state it may use. `reset` is called after the environment's own `reset`.

    If it has a method `rewarded(reward)`, that is called with the reward of the last action before each further `act`.
    """

    def reset(self) -> None: ...
    def act(self, observation: Any, taken: Any = None) -> Any:
        """The action for this step. `taken` is the action executed in the step before (None: the one this expert chose)."""
        ...


class ExpertLost(Exception):
    """An expert cannot finish this episode, for example after a disturbance. Another seed is then tried."""


class UnknownEnvironment(DataError):
    """No family has a task of this name."""


class NoExpert(DataError):
    """A family has no expert for the task. The message says how to give one."""


class MissingExtra(DataError):
    """A package that a family needs is not installed."""


class Stateless:
    """An expert that is a function of the observation alone."""

    def __init__(self, action: Callable[[Any], Any]) -> None:
        self._action = action

    def reset(self) -> None:
        pass

    def act(self, observation: Any, taken: Any = None) -> Any:
        return self._action(observation)


class Family:
    """A family of environments.

    Users subclass this, and name the class or an instance in an entry point of the group `tiphys.environments`. The entry point's
    name is the prefix of their tasks: `mygame` serves `mygame` and `mygame/…`.

    extra       the extra of this project that installs the packages of the family; empty: none does
    normalise   what a score of these tasks is: return | success
    noise       default disturbance of demonstrations; see `disturb`
    """

    extra = "envs"
    normalise = "return"
    noise = 0.0

    def owns(self, task: str) -> bool:
        """Whether a task of this name, existing or not, belongs to this family. It is not called for families of users."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """The tasks that exist, sorted."""
        raise NotImplementedError

    def make(self, task: str, **options: Any) -> Environment:
        """An environment. An episode after `reset(seed=s)` must depend only on s and the actions, not on earlier episodes."""
        raise NotImplementedError

    def expert(self, task: str, env: Environment) -> Expert:
        """The family's own expert for one environment. Raises NoExpert if there is none."""
        raise NoExpert(
            f"task {task!r} has no expert: give one with `--policy agent.zip --trust-policy` or `--policy module:function`"
        )

    def max_steps(self, task: str, env: Environment) -> int:
        """The horizon in steps; 0: the environment sets no limit, or it is unknown."""
        spec = getattr(env, "spec", None)
        return int(getattr(spec, "max_episode_steps", None) or 0)

    def horizon_options(self, steps: int) -> dict[str, Any]:
        """Options of `make` that give an environment a longer horizon; empty if there are none."""
        return {}

    def fields(self, task: str, env: Environment) -> tuple[FieldSpec, ...]:
        """The task's fields; by default they follow from the environment's spaces."""
        return space_fields(env.observation_space, env.action_space)

    def disturb(self, action: Any, space: Any, noise: float, rng: np.random.Generator) -> Any:
        """The action to execute instead of the expert's action (Laskey et al. 2017, DART).

        Continuous: Gaussian noise is added, with a standard deviation of `noise` times half the range, and clipped to the space.
        Discrete: with probability `noise`, a uniformly random value. Dict and Tuple: each part. Raises DataError for other
        spaces, and for a Box without bounds.
        """
        kind = space_kind(space)
        if kind == "Dict":
            return {key: self.disturb(action[key], part, noise, rng) for key, part in space.spaces.items()}
        if kind == "Tuple":
            return tuple(self.disturb(a, part, noise, rng) for a, part in zip(action, space.spaces, strict=True))
        if kind == "Box" and np.isfinite(space.low).all() and np.isfinite(space.high).all():
            real = np.issubdtype(space.dtype, np.floating)
            low, high = (
                b if real else b.astype(np.float64) for b in (space.low, space.high)
            )  # uint8 would wrap around
            span = (high - low) / 2
            moved = np.clip(action + rng.normal(size=span.shape) * noise * span, low, high)
            return (moved if real else np.rint(moved)).astype(space.dtype)
        if kind == "Discrete":
            return int(space.start + rng.integers(space.n)) if rng.random() < noise else action
        if kind == "MultiDiscrete":
            return np.where(rng.random(space.nvec.shape) < noise, space.start + rng.integers(space.nvec), action)
        if kind == "MultiBinary":
            return np.where(rng.random(space.shape) < noise, rng.integers(2, size=space.shape), action)
        raise DataError(f"actions of {space} cannot be disturbed: collect with noise 0")

    def spec(self, task: str) -> TaskSpec:
        """The task as its environment declares it, without scores."""
        env = self.make(task)
        try:
            return TaskSpec(
                name=task,
                fields=self.fields(task, env),
                environment=task,
                normalise=self.normalise,
                max_steps=self.max_steps(task, env),
            )
        finally:
            env.close()


def render_without_display() -> None:
    """Let MuJoCo render by EGL and pygame in memory if there is no display, unless the environment variables say otherwise.

    This must be called before the first renderer is made.
    """
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def space_fields(observation_space: Any, action_space: Any) -> tuple[FieldSpec, ...]:
    """The FieldSpecs of gymnasium spaces, and those of the reward and both flags."""
    return (
        *_fields(observation_space, "observation", "observation"),
        *_fields(action_space, "action", "action"),
        FieldSpec("reward", "reward", "continuous", "float32"),
        FieldSpec("terminated", "terminated", "discrete", "bool", values=2),
        FieldSpec("truncated", "truncated", "discrete", "bool", values=2),
    )


def space_kind(space: Any) -> str:
    """Name of gymnasium's class that the space is an instance of, found without importing gymnasium; "" if it is none."""
    known = ("Dict", "Tuple", "Box", "Discrete", "MultiDiscrete", "MultiBinary", "Text", "Sequence", "Graph", "OneOf")
    return next((c.__name__ for c in type(space).__mro__ if c.__name__ in known), "")


def _fields(space: Any, name: str, role: str) -> tuple[FieldSpec, ...]:
    kind = space_kind(space)
    if kind == "Dict":
        return tuple(f for key, part in space.spaces.items() for f in _fields(part, f"{name}.{key}", role))
    if kind == "Tuple":
        return tuple(f for i, part in enumerate(space.spaces) for f in _fields(part, f"{name}.{i}", role))
    if kind == "Discrete":
        first = int(space.start)
        return (FieldSpec(name, role, "discrete", "int64", **integer_range(first, first + int(space.n) - 1)),)
    if kind == "MultiDiscrete":
        found = integer_range(space.start, space.start + space.nvec - 1)
        return (FieldSpec(name, role, "discrete", str(space.dtype), tuple(space.shape), **found),)
    if kind == "MultiBinary":
        return (FieldSpec(name, role, "discrete", str(space.dtype), tuple(space.shape), values=2),)
    if kind == "Text" and role != "action":
        return (FieldSpec(name, "text", "text", "str"),)
    if kind != "Box":
        raise DataError(
            f"{name}: a space of kind {kind or type(space).__name__} ({space}) cannot be stored as {role}; wrap the environment "
            "in one that has a Box, Discrete, MultiDiscrete or MultiBinary space instead"
        )
    return (_box(space, name, role),)


def _box(space: Any, name: str, role: str) -> FieldSpec:
    shape = tuple(int(n) for n in space.shape)
    if np.issubdtype(space.dtype, np.floating):
        # float32 is precise enough for codecs and embeddings, and takes half the bytes of MuJoCo's float64
        low, high = _bounds(space.low), _bounds(space.high)
        return FieldSpec(name, role, "continuous", "float32", shape, low, high)
    picture = space.dtype == np.uint8 and len(shape) in (2, 3) and not space.low.any() and np.all(space.high == 255)
    if picture and role == "observation":
        return FieldSpec(name, role, "image", "uint8", shape, (0.0,), (255.0,))
    return FieldSpec(name, role, "discrete", str(space.dtype), shape, **integer_range(space.low, space.high))


def _bounds(bound: np.ndarray) -> tuple[float, ...] | None:
    """One number if all are equal, else one for each entry. None if any is infinite or above 1e30 (a float's largest value)."""
    flat = np.asarray(bound, np.float64).ravel()
    if not np.all(np.abs(flat) < 1e30):
        return None
    return compact(flat) if flat.size else ()
