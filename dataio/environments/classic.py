"""Classic control (CartPole, Pendulum, MountainCar), with controllers derived from the equations of motion."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiphys.dataio.environments.family import Environment, Expert, Stateless
from tiphys.dataio.environments.gymnasium_family import GymnasiumFamily

TASKS = ("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")


class Classic(GymnasiumFamily):
    noise = 0.2

    def owns(self, task: str) -> bool:
        return task in TASKS

    def names(self) -> list[str]:
        import gymnasium

        return sorted(set(TASKS) & gymnasium.registry.keys())

    def expert(self, task: str, env: Environment) -> Expert:
        core = env.unwrapped  # type: ignore[attr-defined]
        if task == "CartPole-v1":
            return Stateless(cartpole(core))
        if task == "Pendulum-v1":
            return Stateless(pendulum(core))
        if task.startswith("MountainCar"):
            return Stateless(mountain_car(discrete=task == "MountainCar-v0"))
        return super().expert(task, env)


def lqr(a: np.ndarray, b: np.ndarray, q: np.ndarray, r: float) -> np.ndarray:
    """The gain K of u = −K x, for x' = A x + B u and a cost of x·Qx + r u² per step, by iterating the Riccati equation."""
    p = q
    for _ in range(2000):
        k = (b.T @ p @ a) / (r + b.T @ p @ b)
        p = q + a.T @ p @ (a - b @ k)
    return k


def cartpole(env: Any) -> Any:
    """LQR of the linearised cart and pole (Florian 2007, eq. 23). The sign of its force chooses one of the two pushes."""
    total, half = env.masscart + env.masspole, env.length
    inertia = half * (4 / 3 - env.masspole / total)
    pole, cart = env.gravity / inertia, -env.polemass_length * env.gravity / (inertia * total)
    push = np.array([[0], [1 / total + env.polemass_length / (inertia * total**2)], [0], [-1 / (inertia * total)]])
    rate = np.array([[0, 1, 0, 0], [0, 0, cart, 0], [0, 0, 0, 1], [0, 0, pole, 0]], float)
    gain = lqr(np.eye(4) + env.tau * rate, env.tau * push, np.diag([1.0, 1.0, 10.0, 1.0]), 0.01)[0]
    return lambda observation: int(-gain @ observation > 0)


def pendulum(env: Any) -> Any:
    """Adds energy until the rod can reach the top (Åström and Furuta 2000), then holds it there by LQR.

    A rod of mass m and length l has θ̈ = 3g/(2l) sin θ + 3/(ml²) u, so its energy in units of ml²/6 is θ̇² + 3g/l · cos θ.
    """
    stiffness, lever = 3 * env.g / (2 * env.l), 3 / (env.m * env.l**2)
    a = np.eye(2) + env.dt * np.array([[0, 1], [stiffness, 0]])
    gain = lqr(a, np.array([[0], [env.dt * lever]]), np.diag([1.0, 0.1]), 0.001)[0]

    def act(observation: np.ndarray) -> np.ndarray:
        cosine, sine, speed = (float(x) for x in observation)
        angle = np.arctan2(sine, cosine)
        torque = -gain @ np.array([angle, speed])
        if abs(torque) > 2 * env.max_torque or cosine < 0.7:
            missing = 2 * stiffness * (1 - cosine) - speed**2
            torque = np.sign(missing) * np.copysign(env.max_torque, speed)
        return np.clip(np.array([torque], np.float32), -env.max_torque, env.max_torque)

    return act


def mountain_car(discrete: bool) -> Any:
    """Pushes in the direction of motion, which always adds energy."""
    if discrete:
        return lambda observation: 2 if observation[1] >= 0 else 0
    return lambda observation: np.array([1.0 if observation[1] >= 0 else -1.0], np.float32)


FAMILY = Classic()
