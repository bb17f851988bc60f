"""Experts that others trained: Stable-Baselines3 and sb3-contrib agents (zip), or a function of the user's own.

A zip holds pickles, which can run any code when they are opened: nothing of it is read before the user has said that it may be.
"""

from __future__ import annotations

import importlib
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.environments.family import Environment, Expert, MissingExtra, Stateless
from tiphys.dataio.episode import DataError

# Which algorithm wrote a zip: a key that only its `data` has, most special first.
_ALGORITHMS = (
    ("top_quantiles_to_drop_per_net", "sb3_contrib", "TQC"),
    ("cg_max_steps", "sb3_contrib", "TRPO"),
    ("clip_range", "stable_baselines3", "PPO"),
    ("target_entropy", "stable_baselines3", "SAC"),
    ("target_policy_noise", "stable_baselines3", "TD3"),
    ("exploration_rate", "stable_baselines3", "DQN"),
    ("gae_lambda", "stable_baselines3", "A2C"),
)
_NEEDED = ("policy_class", "policy_kwargs")  # of what is pickled inside `data`; all else is left closed
_MOST = 1 << 30  # bytes of an agent


def agent(name: str, trusted: bool = False) -> Callable[[str, Environment], Expert]:
    """What makes the expert for a task and its environment.

    name     `agent.zip`: a Stable-Baselines3 or sb3-contrib agent, with `vecnormalize.pkl` beside it or in the folder of the
             same name; or `module:function`, the user's own (task, environment) -> Expert (`Stateless(f)` makes one of a
             function of the observation)
    trusted  a zip may be opened; without it DataError says why not

    Raises DataError where the name is neither, or its file is missing.
    """
    if name.endswith(".zip"):
        if not Path(name).is_file():
            raise DataError(f"{name}: no such file")
        if not trusted:
            raise DataError(
                f"{name} contains pickles, which can run any code on this machine when they are opened. If you trust who "
                "made it, add --trust-policy"
            )
        return Agent(name)
    module, found, function = name.partition(":")
    if not found or not all(part.isidentifier() for part in [*module.split("."), function]):
        raise DataError(f"{name!r} is no agent: give a Stable-Baselines3 zip, or module:function")
    return Named(module, function)


@dataclass(frozen=True)
class Named:
    """A user's function (task, environment) -> Expert, by name, so that every process imports it itself."""

    module: str
    function: str

    def __call__(self, task: str, env: Environment) -> Expert:
        try:
            make = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError) as error:
            raise DataError(f"{self.module}:{self.function} cannot be imported: {error}") from error
        return make(task, env)


@dataclass(frozen=True)
class Agent:
    """A trained agent in a zip; acts without exploration."""

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
    """The algorithm of a zip, for the spaces of `env`. Opens pickles.

    Spaces, schedules and buffers are pickled too, by versions of gym and NumPy that may be gone: they are replaced, not opened.
    """
    file = Path(path)
    if file.stat().st_size > _MOST:
        raise DataError(f"{path}: {file.stat().st_size} bytes are more than an agent has ({_MOST})")
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.getinfo("data").file_size > _MOST:
                raise DataError(f"{path}: its `data` would take {archive.getinfo('data').file_size} bytes")
            data = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DataError(f"{path} is no Stable-Baselines3 agent: {error}") from error
    try:
        package, name = next((package, name) for key, package, name in _ALGORITHMS if key in data)
    except StopIteration:
        known = ", ".join(name for _, _, name in _ALGORITHMS)
        raise DataError(f"{path}: none of the algorithms that can be loaded ({known}) wrote this") from None
    try:
        algorithm = getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise MissingExtra(f"{path}: {package} is not installed: pip install 'tiphys[agents]'") from error
    closed: dict[str, Any] = {k: None for k, v in data.items() if isinstance(v, dict) and ":serialized:" in v}
    closed = {k: v for k, v in closed.items() if k not in _NEEDED}
    closed |= {"lr_schedule": _zero, "clip_range": _zero, "exploration_schedule": _zero, "learning_rate": 0.0}
    closed |= {"observation_space": env.observation_space, "action_space": env.action_space, "n_envs": 1}
    # acting needs no memory of a million steps, and nothing of how training went
    closed |= {"buffer_size": 1, "optimize_memory_usage": False, "train_freq": 1, "target_entropy": 0.0}
    try:
        return algorithm.load(path, device="cpu", custom_objects=closed)
    except Exception as error:  # torch and pickle raise what they like
        raise DataError(
            f"{path}: this {name} agent cannot act in an environment with observations {env.observation_space} and actions "
            f"{env.action_space}: {error}"
        ) from error


def _zero(_: float) -> float:
    return 0.0


def _normaliser(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """What VecNormalize did to observations while the agent was trained, from the statistics saved beside it."""
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
    """Stands for any object of a library: keeps its attributes, runs none of its code."""

    state: dict[str, Any]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Statistics(pickle.Unpickler):
    """Reads a saved VecNormalize: arrays as NumPy makes them, every other object as its attributes alone."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if module.split(".")[0] in ("stable_baselines3", "gym", "gymnasium", "numpy", "collections"):
            return _Saved
        raise DataError(
            f"the normalisation statistics hold a {module}.{name}, which they have no need of; they are not opened"
        )
