"""Whether a policy of a task fits an environment, and its actions in the form that the environment's space takes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from tiphys.dataio.environments.family import space_kind
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.observation import same_numbers


def misfits(task: TaskSpec, needed: Collection[str], declared: Sequence[FieldSpec]) -> Iterator[str]:
    """Why a policy cannot act in the environment of a task, a sentence for each field.

    needed    names of the fields that the policy sees and predicts
    declared  the fields of the environment, as `Family.fields` gives them
    """
    has = {f.name: f for f in declared}
    actions = {f.name for f in declared if f.role == "action"}
    for field in (f for f in task.fields if f.name in needed and f.role in ("observation", "text", "action")):
        where, env = f"task {task.name!r}, field {field.name!r}", f"environment {task.environment!r}"
        if field.name not in has:
            parts = sorted(
                actions if field.role == "action" else has.keys() - actions - {"reward", "terminated", "truncated"}
            )
            yield f"{where}: {env} has no such field, it has {', '.join(parts) or 'none'}; rename the field in the mapping file"
            continue
        other = has[field.name]
        if not (same_numbers(field.shape, other.shape) or same_numbers(other.shape, field.shape)):
            yield f"{where}: its data have shape {field.shape}, but {env} has shape {other.shape}"
        elif (field.modality == "text") != (other.modality == "text"):
            yield f"{where}: it is {field.modality} in the data, but {other.modality} in {env}"
        elif field.role == "action" and field.modality == "continuous" and other.modality == "discrete":
            yield (
                f"{where}: it is continuous in the data, but {env} takes whole numbers; convert the data with "
                "`modality: discrete` and `dtype: int64` for this field in the mapping file"
            )
    for name in sorted(actions - set(needed)):
        yield (
            f"task {task.name!r}: environment {task.environment!r} takes the action field {name!r}, which the policy does not "
            "predict"
        )


def fitted(action: Any, space: Any, where: str, name: str = "action") -> Any:
    """An action as the space takes it: its nesting, shape and dtype. Only axes of length 1 may differ.

    action  a value, or nested dicts of values, in which the parts of a Tuple have the keys "0", "1", …
    where   the task, for messages
    name    name of the field

    Raises DataError, which names task, field and both shapes, if the action does not fit.
    """
    kind = space_kind(space)
    if kind == "Dict":
        return {
            key: fitted(_part(action, key, where, name), s, where, f"{name}.{key}") for key, s in space.spaces.items()
        }
    if kind == "Tuple":
        parts = enumerate(space.spaces)
        return tuple(fitted(_part(action, i, where, name), s, where, f"{name}.{i}") for i, s in parts)
    if kind not in ("Box", "Discrete", "MultiDiscrete", "MultiBinary"):
        return action
    value = np.asarray(action)
    shape = () if kind == "Discrete" else tuple(space.shape)
    if value.dtype.kind not in "biuf" or not same_numbers(value.shape, shape):
        raise DataError(
            f"{where}, field {name!r}: the action has shape {value.shape} ({value.dtype}), but the environment takes {shape}"
        )
    value = value.reshape(shape)
    if kind == "Box" and np.issubdtype(space.dtype, np.floating):
        return value.astype(space.dtype, copy=False)
    with np.errstate(invalid="ignore"):
        whole = value.astype(space.dtype)
    if not np.array_equal(whole, value) or not space.contains(whole):
        raise DataError(f"{where}, field {name!r}: the action {value.tolist()} is not in {space}")
    return int(whole) if kind == "Discrete" else whole


def _part(action: Any, key: Any, where: str, name: str) -> Any:
    try:
        return action[key] if isinstance(action, tuple) or key in action else action[str(key)]
    except (KeyError, IndexError, TypeError):
        raise DataError(
            f"{where}, field {name!r}: the action lacks the part {key!r}, which the environment takes"
        ) from None
