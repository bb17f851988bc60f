"""The fields of one agent, of tasks whose steps have values of several agents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec

_ROLES = ("observation", "action", "mask")


def agent_fields(task: TaskSpec, agents: int) -> tuple[str, ...]:
    """Names of the fields that have values of each agent: those whose first axis has as many entries as there are agents.

    Raises
    ------
    DataError
        If an action is none of them, or there are fewer than two agents.
    """
    if agents < 2:
        raise DataError(
            f"task {task.name!r}: set `options: {{agents: n}}` of the objective to the number of agents, which is the first axis "
            "of the actions, and at least 2"
        )
    lacking = [f for f in task.with_role("action") if not _has(f, agents)]
    if lacking:
        raise DataError(
            f"task {task.name!r}: the action {lacking[0].name!r} has shape {lacking[0].shape}, but with {agents} agents its "
            "first axis must have as many entries; correct `options: {agents: …}` of the objective"
        )
    return tuple(f.name for f in task.with_role(*_ROLES) if _has(f, agents))


def _has(field: FieldSpec, agents: int) -> bool:
    return field.per == "step" and field.modality != "text" and field.shape[:1] == (agents,)


def of_one_agent(task: TaskSpec, names: tuple[str, ...], agents: int) -> TaskSpec:
    """The task as one agent sees it. A bound that differs between agents is the widest."""
    return replace(task, fields=tuple(one_agent(f, agents) if f.name in names else f for f in task.fields))


def one_agent(field: FieldSpec, agents: int) -> FieldSpec:
    """A field as one agent sees it."""
    bounds: dict[str, Any] = {}
    for key, widest in (("low", np.min), ("high", np.max)):
        bound = getattr(field, key)
        if bound is not None and len(bound) > 1:
            bounds[key] = tuple(widest(field.entries(bound).reshape(agents, -1), axis=0).tolist())
    return replace(field, shape=field.shape[1:], **bounds)
