"""A policy plays an environment that need not be one of its tasks."""

from __future__ import annotations

from typing import Any

import torch

from tiphys.dataio import environments
from tiphys.dataio.collect import EVALUATION_SEEDS, LONGEST
from tiphys.dataio.environments import Environment
from tiphys.pretrain.acting.ask import Ask
from tiphys.pretrain.acting.play import Played, play_group
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.scores import summary

GROUP = 10  # episodes that share a forward pass


def play(policy: str | Policy, task: str, ask: Ask, episodes: int, mission: str = "") -> dict[str, Any]:
    """The scores of a policy in the environment `task`, on the seeds of evaluations.

    Parameters
    ----------
    policy : str or Policy
        A policy, or its folder.
    task : str
        Name of an environment.
    ask : Ask
        The task that the policy acts as, and what it is asked for.
    episodes : int
        How many are played.
    mission : str
        The instruction that the policy reads instead of the environment's own; "": its own.

    Returns
    -------
    dict
        As the entry of a task in an evaluation.json, with `random` and `expert` of None.
    """
    torch.set_num_threads(1)
    acting = Policy.load(policy) if isinstance(policy, str) else policy
    spec = environments.spec(task)
    envs = [environments.make(task) for _ in range(min(GROUP, episodes))]
    declared = environments.family(task).fields(task, envs[0])
    if mission:
        envs = [_misled(env, mission) for env in envs]
    played: list[Played] = []
    for first in range(0, episodes, GROUP):
        seeds = range(EVALUATION_SEEDS + first, EVALUATION_SEEDS + min(first + GROUP, episodes))
        played += play_group(acting, spec, envs[: len(seeds)], seeds, LONGEST, declared, ask)
    for env in envs:
        env.close()
    return summary(spec, [p.outcome for p in played])


def _misled(env: Environment, mission: str) -> Environment:
    import gymnasium

    class Misled(gymnasium.ObservationWrapper):
        """Shows another mission than that of the level."""

        def observation(self, observation: Any) -> Any:
            return {**observation, "mission": mission}

    return Misled(env)  # type: ignore[arg-type, return-value]
