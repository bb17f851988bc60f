"""A policy as a server holds it: its tasks, its histories by task, and what it tells its clients about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.observation import observation_fields
from tiphys.pretrain.acting.load import draws_by_default
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.serving.observed import Needed, Sent, as_text, misfit

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.tokens.timestep import TimestepLayout

PROTOCOL = 1  # of the keys that Tiphys adds to openpi's
_MOST_SHOWN = 16  # tasks in a message


@dataclass(frozen=True)
class Settings:
    """How policies are served.

    Attributes
    ----------
    task : str
        The task of all clients that name none; "": the one whose fields fit.
    execute : int
        Actions of a chunk that clients carry out before they send the next observation; 0: all.
    sessions : int
        Most histories at once.
    sample : bool or None
        Draw actions instead of taking the most probable ones; None: as the policy's recipe says.
    seed : int
        Seed of these draws.
    device : str
        As for `Policy.load`.
    """

    task: str = ""
    execute: int = 0
    sessions: int = 64
    sample: bool | None = None
    seed: int = 0
    device: str = ""


@dataclass(frozen=True)
class Wish:
    """What a client asks of its next episodes.

    Attributes
    ----------
    task, objective : str
        Their names; "": as the server chooses.
    target_return : float, str or None
        Return to ask for, as in `Policy.reset`.
    stream : int or None
        Stream of random draws; None: a new one.
    sample : bool or None
        None: as the server was started.
    limits : tuple of FieldSpec
        Discrete action fields with the values that the client's environment takes.
    """

    task: str = ""
    objective: str = ""
    target_return: float | str | None = None
    stream: int | None = None
    sample: bool | None = None
    limits: tuple[FieldSpec, ...] = ()


class Histories:
    """Histories of one task, one for each session. They act together in one forward pass.

    Only the inference thread may use it.
    """

    def __init__(self, policy: Policy, needed: Needed, limits: Sequence[FieldSpec], rows: int, execute: int) -> None:
        self.policy, self.needed = policy, needed
        try:
            policy.reset(needed.task, rows, objective=needed.objective)
        except KeyError as error:
            raise DataError(str(error.args[0])) from None
        policy.limit(limits)
        self.chunk = policy.history.layout.chunk
        self.execute = executed_at_once(self.chunk, execute, needed.task)
        self.needs_rewards = policy.history.needs_rewards
        self.fields = policy.processor.tasks[needed.task].with_role("action")
        self._free = list(range(rows))

    def take(self) -> int:
        return self._free.pop()

    def give(self, row: int) -> None:
        self._free.append(row)

    def begin(self, row: int, stream: int, target_return: float | str | None) -> None:
        """Begin a new episode in a row. Raises DataError if this return cannot be asked for."""
        self.policy.restart(row, stream=stream, target_return=target_return)

    def act(self, rows: Sequence[int], fields: Sequence[Mapping[str, Any]], rewards: Sequence[float]) -> list[Any]:
        """The next actions of some rows: for each, field -> array [H, *shape], in the units of the data.

        H is the horizon of the policy. The first `execute` of them stand in the history as done.
        """
        given, earned = [dict(one) for one in fields], list(rewards)
        steps: list[list[dict[str, Any]]] = [[] for _ in rows]
        for _ in range(self.chunk):  # the steps between two observations show the actions only
            for mine, action in zip(steps, self.policy.act(list(given), earned, list(rows)), strict=True):
                mine.append(observation_fields(action, "action"))
            earned = [0.0] * len(rows)
        for mine, row in zip(steps, rows, strict=True):
            mine += [observation_fields(action, "action") for action in self.policy.beyond(row)]
        return [{name: np.stack([np.asarray(one[name]) for one in mine]) for name in mine[0]} for mine in steps]


def executed_at_once(chunk: int, execute: int, task: str) -> int:
    """How many actions of a chunk are carried out. Raises DataError if the policy cannot go on after so many."""
    if execute not in (0, chunk):
        raise DataError(
            f"--execute {execute}: task {task!r} was learned with an observation at every {chunk}. step, so exactly {chunk} "
            f"action{'s are' if chunk > 1 else ' is'} carried out between two observations"
        )
    return chunk


class Served:
    """One policy that is served.

    Parameters
    ----------
    policy : Policy
        The policy.
    settings : Settings
        How it is served.
    digest : str
        SHA-256 of its weights and processor.

    Raises
    ------
    DataError
        If it cannot act, has no task of the settings, or cannot carry out so many actions at once.
    """

    def __init__(self, policy: Policy, settings: Settings, digest: str = "") -> None:
        self.settings, self.digest = settings, digest
        self._step: int | None = None  # if the weights are newer than the model's config
        self.model, self.processor, self.tasks = policy.model, policy.processor, policy.tasks
        self.about: Mapping[str, Any] = getattr(policy.model.config, "tiphys", None) or {}
        if not self.tasks:
            raise DataError("the policy cannot act: none of its tasks has actions")
        if settings.task and settings.task not in self.tasks:
            raise DataError(f"the policy has no task {settings.task!r}; its tasks are {self._names(self.tasks)}")
        for task in (settings.task,) if settings.task else self.tasks:
            executed_at_once(self._chunk(task), settings.execute, task)
        self._histories: dict[Any, Histories] = {}
        self._needed: dict[tuple[str, str], Needed] = {}

    @classmethod
    def load(cls, folder: str | Path, settings: Settings) -> Served:
        """The policy of a local folder. Raises DataError or OSError as `Policy.load`."""
        from tiphys.pretrain.pretrained import policy_digest

        policy = Policy.load(folder, settings.device, sample=settings.sample, seed=settings.seed)
        return cls(policy, settings, policy_digest(str(folder)))

    @property
    def step(self) -> int:
        """Training steps that the policy has done."""
        return int(self.about.get("step", 0) or 0) if self._step is None else self._step

    def renewed(self, model: DecisionModel, step: int, digest: str) -> Served:
        """The same policy with other weights, and without histories."""
        policy = Policy(model, self.processor, sample=self.settings.sample, seed=self.settings.seed)
        found = Served(policy, self.settings, digest)
        found._step = step
        return found

    def needed(self, task: str, objective: str = "") -> Needed:
        """What is needed in a task. Raises DataError if the policy does not act in it."""
        if task not in self.tasks:
            raise DataError(f"the policy has no task {task!r}; its tasks are {self._names(self.tasks)}")
        if (task, objective) not in self._needed:
            self._needed[task, objective] = Needed.of(self.processor, task, objective)
        return self._needed[task, objective]

    def choose(self, wish: Wish, sent: Sent) -> Needed:
        """The task of what was sent: the one that it names, that of the reset, that of the settings, or the only one that fits.

        Raises
        ------
        DataError
            If none fits, or several do.
        """
        task = self.named(sent) or wish.task or self.settings.task
        if task or len(self.tasks) == 1:
            return self.needed(task or self.tasks[0], wish.objective)
        reasons = {name: misfit(self.needed(name, wish.objective), sent) for name in self.tasks}
        found = [name for name, reason in reasons.items() if not reason]
        if len(found) == 1:
            return self.needed(found[0], wish.objective)
        if found:
            raise DataError(
                f"what was sent fits several tasks: {self._names(found)}; send `task`, or start the server with --task NAME"
            )
        nearest = next(iter(reasons.values()))
        raise DataError(f"what was sent fits none of the tasks {self._names(self.tasks)}; for example: {nearest}")

    def named(self, sent: Sent) -> str:
        """The task that a message names by its key `task`; "" if that is none of the policy's."""
        found = as_text(sent.values.get("task"))
        return found if found in self.tasks else ""

    def histories(self, wish: Wish, needed: Needed) -> Histories:
        """The histories of a task, for what a client asks. Raises DataError if it cannot be asked."""
        asked = (wish.sample, self.settings.sample, draws_by_default(self.model))
        sample = next(choice for choice in asked if choice is not None)
        key = (needed.task, needed.objective, sample, wish.limits)
        if key not in self._histories:
            policy = Policy(self.model, self.processor, sample=sample, seed=self.settings.seed)
            rows, execute = self.settings.sessions, self.settings.execute
            self._histories[key] = Histories(policy, needed, wish.limits, rows, execute)
        return self._histories[key]

    def forget(self, histories: Histories) -> None:
        """Free the memory of histories that no session uses."""
        self._histories = {key: one for key, one in self._histories.items() if one is not histories}

    def _chunk(self, task: str) -> int:
        return self._layout(task).chunk

    def _layout(self, task: str) -> TimestepLayout:
        return self.processor.layouts[self.processor.objective(task)][task]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What clients are told when they connect."""
        names = (self.settings.task,) if self.settings.task else self.tasks
        tasks = {}
        for name in names:
            actions = self.processor.tasks[name].with_role("action")
            tasks[name] = {
                "observations": self.needed(name).shapes(),
                "actions": [{"name": f.name, "shape": list(f.shape), "dtype": f.dtype} for f in actions],
                "horizon": max([self._chunk(name), *(e.horizon for e in self._layout(name).elements)]),
                "execute": self._chunk(name),
                "frame": "absolute",  # of what clients get, whatever the policy predicts
            }
        first = tasks[names[0]]
        return {
            "server": "tiphys",
            "protocol": PROTOCOL,
            "policy": str(self.about.get("name", "")),
            "step": self.step,
            "digest": self.digest,
            "horizon": first["horizon"],
            "execute": first["execute"],
            "frame": first["frame"],
            "sessions": self.settings.sessions,
            "tasks": tasks,
        }

    @staticmethod
    def _names(names: Sequence[str]) -> str:
        more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
        return ", ".join(names[:_MOST_SHOWN]) + more
