"""Experts from elsewhere: Stable-Baselines3 and sb3-contrib agents (zip files), or a function of the user.

A zip contains pickles, which can run any code when they are opened. So nothing of it is read before the user has allowed it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.environments.family import Environment, Expert, MissingExtra, Stateless
from tiphys.dataio.environments.modules import load
from tiphys.dataio.episode import DataError

# Tells which algorithm wrote a zip: a key of its `data`. The first key that is there decides.
_ALGORITHMS = (
    ("top_quantiles_to_drop_per_net", "sb3_contrib", "TQC"),
    ("cg_max_steps", "sb3_contrib", "TRPO"),
    ("clip_range", "stable_baselines3", "PPO"),
    ("target_entropy", "stable_baselines3", "SAC"),
    ("target_policy_noise", "stable_baselines3", "TD3"),
    ("exploration_rate", "stable_baselines3", "DQN"),
    ("gae_lambda", "stable_baselines3", "A2C"),
)
_NEEDED = ("policy_class", "policy_kwargs")  # the only values pickled inside `data` that are opened
_MOST = 1 << 30  # most bytes of an agent


def agent(name: str, trusted: bool = False) -> Callable[[str, Environment], Expert]:
    """A function that makes the expert for a task and its environment.

    name     `agent.zip`: a Stable-Baselines3 or sb3-contrib agent; its `vecnormalize.pkl`, if any, is beside it or in the
             folder of the same name. Or `module:name`: the user's own function or class, see `Named`
    trusted  whether a zip may be opened

    Raises DataError if the name is neither, the file is missing, or a zip is not trusted.
    """
    if name.endswith(".zip"):
        if not Path(name).is_file():
            raise DataError(f"{name}: no such file")
        if not trusted:
            raise DataError(
                f"{name} contains pickles, which can run any code on this machine when they are opened. If you trust its "
                "author, add --trust-policy"
            )
        return Agent(name)
    module, found, function = name.partition(":")
    if not found or not all(part.isidentifier() for part in [*module.split("."), function]):
        raise DataError(f"{name!r} is not an agent: give a Stable-Baselines3 zip, or module:function")
    return Named(module, function)


@dataclass(frozen=True)
class Named:
    """An expert of the user, given by name, so that each process can import it. The name may stand for

    - a function of the observation, which returns the action;
    - a function (task, environment), which returns an expert or such a function;
    - a class with a method `act(observation)`, made with (task, environment) or without arguments;
    - an object with a method `act(observation)`.

    `act` may take the executed action of the step before as a second argument. `reset()` and `rewarded(reward)` are called if
    there are such methods.
    """

    module: str
    function: str

    def __call__(self, task: str, env: Environment) -> Expert:
        name = f"{self.module}:{self.function}"
        try:
            found = getattr(load(self.module, f"expert {name}"), self.function)
        except AttributeError:
            raise DataError(f"expert {name}: the module {self.module!r} has no {self.function!r}") from None
        return _expert(found, task, env, name)


def _expert(found: Any, task: str, env: Environment, name: str) -> Expert:
    if isinstance(found, type):
        found = found(task, env) if _takes(found, task, env) else found()
    elif not hasattr(found, "act") and _takes(found, task, env) and not _takes(found, None):
        found = found(task, env)
    if hasattr(found, "act"):
        return _Acting(found)
    if callable(found):
        return Stateless(found)
    raise DataError(
        f"expert {name}: a {type(found).__name__} cannot act; give a function of the observation, or a class with a method "
        "`act(observation)`"
    )


def _takes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function can be called with these arguments; True if its signature is unknown."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a function of an extension module
        pass
    return True


class _Acting:
    """An expert of an object with a method `act`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._takes_taken = _takes(actor.act, None, None)
        if hasattr(actor, "rewarded"):
            self.rewarded = actor.rewarded

    def reset(self) -> None:
        if hasattr(self._actor, "reset"):
            self._actor.reset()

    def act(self, observation: Any, taken: Any = None) -> Any:
        return self._actor.act(observation, taken) if self._takes_taken else self._actor.act(observation)


@dataclass(frozen=True)
class Agent:
    """A trained agent in a zip, which acts without exploration."""

    path: str

    def __call__(self, task: str, env: Environment) -> Expert:
        model = load_zip(self.path, env)
        normalise = _normaliser(self.path)
        discrete = hasattr(env.action_space, "n")

        def act(observation: Any) -> Any:
            action, _ = model.predict(normalise(observation), deterministic=True)
            return int(action) if discrete else np.asarray(action, env.action_space.dtype)

        return Stateless(act)


def load_zip(path: str, env: Environment) -> Any:
    """Load the algorithm in a zip, for the spaces of `env`. This opens pickles.

    Pickled spaces, schedules and buffers are replaced, not opened, because they may come from old versions of gym and NumPy.

    Raises DataError if the file is not an agent or does not fit the environment, MissingExtra if its package is not installed.
    """
    file = Path(path)
    if file.stat().st_size > _MOST:
        raise DataError(f"{path}: {file.stat().st_size} bytes are too many for an agent; at most {_MOST} are read")
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.getinfo("data").file_size > _MOST:
                raise DataError(
                    f"{path}: its `data` would take {archive.getinfo('data').file_size} bytes; at most {_MOST} are read"
                )
            data = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a Stable-Baselines3 agent: {error}") from error
    try:
        package, name = next((package, name) for key, package, name in _ALGORITHMS if key in data)
    except StopIteration:
        known = ", ".join(name for _, _, name in _ALGORITHMS)
        raise DataError(f"{path}: it was written by none of the algorithms that can be loaded: {known}") from None
    try:
        algorithm = getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise MissingExtra(f"{path}: {package} is not installed: pip install 'tiphys[agents]'") from error
    closed: dict[str, Any] = {k: None for k, v in data.items() if isinstance(v, dict) and ":serialized:" in v}
    closed = {k: v for k, v in closed.items() if k not in _NEEDED}
    closed |= {"lr_schedule": _zero, "clip_range": _zero, "exploration_schedule": _zero, "learning_rate": 0.0}
    closed |= {"observation_space": env.observation_space, "action_space": env.action_space, "n_envs": 1}
    # acting needs neither a replay buffer nor the settings of training
    closed |= {"buffer_size": 1, "optimize_memory_usage": False, "train_freq": 1, "target_entropy": 0.0}
    try:
        return algorithm.load(path, device="cpu", custom_objects=closed)
    except Exception as error:  # torch and pickle raise errors of many classes
        raise DataError(
            f"{path}: this {name} agent cannot act in an environment with observations {env.observation_space} and actions "
            f"{env.action_space}: {error}"
        ) from error


def _zero(_: float) -> float:
    return 0.0


def _normaliser(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """The normalisation of observations by VecNormalize during training, from the statistics saved beside the agent."""
    file = Path(path)
    places = (file.with_suffix("") / "vecnormalize.pkl", file.with_name("vecnormalize.pkl"))
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        return lambda observation: observation
    with found.open("rb") as stream:
        saved = _Statistics(stream).load().state
    if not saved.get("norm_obs", True):
        return lambda observation: observation
    statistics, epsilon, clip = saved["obs_rms"].state, saved["epsilon"], saved["clip_obs"]
    mean, deviation = statistics["mean"], np.sqrt(statistics["var"] + epsilon)
    return lambda observation: np.clip((observation - mean) / deviation, -clip, clip).astype(np.float32)


class _Saved:
    """Replaces a pickled object of a library: it keeps the attributes, and runs none of the library's code."""

    state: dict[str, Any]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Statistics(pickle.Unpickler):
    """Reads a saved VecNormalize. Only NumPy's arrays are opened; other objects are replaced by their attributes."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if module.split(".")[0] in ("stable_baselines3", "gym", "gymnasium", "numpy", "collections"):
            return _Saved
        raise DataError(
            f"the normalisation statistics contain a {module}.{name}, which they do not need; they are not opened"
        )
