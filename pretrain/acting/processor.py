"""Processor: what a policy needs besides its weights, to lay out histories and to decode actions. No dataset, no torch.

The same code (`tiphys.pretrain.tokens.sequence`) lays out a history and a training window, so acting and training cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, TaskSpec, Window
from tiphys.dataio.stored import number, stored, task_specs
from tiphys.pretrain.acting.history import History
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.sequence import assemble
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import TimestepLayout
from tiphys.pretrain.tokens.vocabulary import Vocabulary

# Version 1 does not say where returns come from (they are returns to go), and has only causal windows in which nothing is hidden
# and nothing stands after the last step. These are the defaults of what version 2 says.
VERSIONS = (1, 2)


@dataclass(frozen=True)
class _File:
    """The keys of processor.json. `stored` is given those that have a form of their own."""

    version: int
    length: int
    vocabulary: Any
    tasks: Any
    best_return: Mapping[str, float]
    objectives: Mapping[str, Any]


def _layouts(objective: Any, where: str, vocabulary: Vocabulary, length: int) -> dict[str, TimestepLayout]:
    """The layouts of an objective, by task. Raises DataError if one is not valid or does not fit the vocabulary."""
    if not isinstance(objective, Mapping) or not isinstance(objective.get("timesteps"), Mapping):
        raise DataError(f"{where}: it has no timesteps")
    number(objective.get("target_return"), f"{where}, target_return", -1e300, 1e300)
    number(objective.get("prompt_steps"), f"{where}, prompt_steps", 0, 1 << 24)
    out = {}
    for task, values in objective["timesteps"].items():
        out[task] = TimestepLayout.from_dict(values, f"{where}, task {task!r}")
        out[task].check(vocabulary, length, f"{where}, task {task!r}")
    return out


class Processor:
    """What a policy needs besides its weights. In a policy's folder it is processor.json (version 2).

    ``Processor.from_dict(objectives.processor())`` makes one from an `Objectives`.

    Parameters
    ----------
    vocabulary : Vocabulary
        The vocabulary of the run.
    tasks : mapping of str to TaskSpec
        The tasks, by name.
    layouts : mapping of str to mapping of str to TimestepLayout
        Objective -> task -> how its timesteps become positions.
    objectives : mapping of str to mapping
        Objective -> {"paradigm", "target_return", "prompt_steps", …}.
    best_return : mapping of str to float
        Task -> best return in the data, in rewards.
    length : int
        Most positions of a row.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tasks: Mapping[str, TaskSpec],
        layouts: Mapping[str, Mapping[str, TimestepLayout]],
        objectives: Mapping[str, Mapping[str, Any]],
        best_return: Mapping[str, float],
        length: int,
    ):
        self.vocabulary, self.tasks, self.layouts = vocabulary, tasks, layouts
        self.objectives, self.best_return, self.length = objectives, best_return, length
        self.text = TextTokenizer(vocabulary.text_tokenizer)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Processor:
        """The processor of a processor.json.

        Parameters
        ----------
        values : mapping
            The JSON.

        Raises
        ------
        DataError
            If its version is not one of `VERSIONS`, or it has a codec that this version does not have, or is not valid: the
            message names the key.
        """
        version = values.get("version") if isinstance(values, Mapping) else None
        if version not in VERSIONS or isinstance(version, bool):
            known = " and ".join(map(str, VERSIONS))
            raise DataError(f"processor.json has version {version!r}, but this Tiphys reads {known}; update Tiphys")
        parts = stored(_File, values, "processor.json", tasks=values.get("tasks"), vocabulary=values.get("vocabulary"))
        tasks = task_specs(parts.tasks, "processor.json, tasks")
        vocabulary = Vocabulary.from_dict(parts.vocabulary)
        length = int(number(parts.length, "processor.json, length", 1, 1 << 24))
        layouts = {
            name: _layouts(objective, f"processor.json, objective {name!r}", vocabulary, length)
            for name, objective in parts.objectives.items()
        }
        processor = cls(
            vocabulary, {task.name: task for task in tasks}, layouts, parts.objectives, parts.best_return, length
        )
        processor.text.check(vocabulary)
        return processor

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        objectives = {
            name: {**objective, "timesteps": {task: t.to_dict() for task, t in self.layouts[name].items()}}
            for name, objective in self.objectives.items()
        }
        return {
            "version": VERSIONS[-1],
            "length": self.length,
            "vocabulary": self.vocabulary.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks.values()],
            "best_return": dict(self.best_return),
            "objectives": objectives,
        }

    def objective(self, task: str) -> str:
        """Name of the first objective that a task was trained with.

        Raises
        ------
        KeyError
            If the policy was not trained on the task.
        """
        for name, layouts in self.layouts.items():
            if task in layouts:
                return name
        raise KeyError(f"this policy has no task {task!r}; its tasks are {', '.join(self.tasks)}")

    def used_fields(self, task: str) -> frozenset[str]:
        """Names of the fields that a policy sees and predicts when it acts in a task.

        Raises
        ------
        KeyError
            If the policy was not trained on the task.
        """
        layout = self.layouts[self.objective(task)][task]
        return frozenset(e.field for e in layout.elements if e.field) | frozenset(layout.preamble)

    def history(
        self,
        task: str,
        environments: int = 1,
        *,
        objective: str = "",
        target_return: float | None = None,
        prompt: Window | None = None,
        hop: bool = False,
    ) -> History:
        """An empty history of a batch of environments of one task.

        Parameters
        ----------
        task : str
            Name of the task.
        environments : int
            Number of environments.
        objective : str
            The objective to act with; "": the first that the task was trained with.
        target_return : float, optional
            Return of an episode to ask for, in rewards. None: the recipe's multiple of the best return in the data. Only
            objectives that show returns use it.
        prompt : Window, optional
            A demonstration of the task. Its last steps stand before each history.
        hop : bool
            Whether a full window drops its older half, instead of its oldest steps.

        Raises
        ------
        KeyError
            If the policy was not trained on the task, or not with this objective.
        DataError
            If the task has no actions.
        """
        name = objective or self.objective(task)
        if task not in self.layouts.get(name, {}):
            known = ", ".join(name for name, by_task in self.layouts.items() if task in by_task)
            raise KeyError(f"task {task!r} was not trained with objective {name!r}, but with {known or 'none'}")
        layout = self.layouts[name][task].acting()
        if not layout.has_actions:
            raise DataError(f"task {task!r} has no actions, so a policy cannot act in it")
        if target_return is None:
            target_return = float(self.objectives[name]["target_return"]) * float(self.best_return[task])
        if prompt is not None:
            prompt = self._prompt(layout, prompt, int(self.objectives[name]["prompt_steps"]))
        return History(self, layout, environments, target_return, prompt, hop)

    def _prompt(self, layout: TimestepLayout, window: Window, steps: int) -> Window:
        """The last steps of a demonstration, as many as a prompt may have."""
        most = min(
            steps or (self.length // 2) // layout.width,
            window.steps,
            (self.length - layout.width) // layout.width,
        )
        first = window.steps - max(most, 0)
        constant = {e.field for e in layout.elements if e.constant} | set(layout.preamble)
        fields = {n: v if n in constant else v[first : window.steps] for n, v in window.fields.items()}
        return Window(
            entry=0,
            task=0,
            episode=window.episode,
            start=window.start + first,
            steps=most,
            episode_steps=window.episode_steps,
            fields=fields,
            step=window.step[first : window.steps],
            returns_to_go=window.returns_to_go[first : window.steps],
            valid=window.valid[first : window.steps],
            prompt=True,
        )

    def encode(self, layout: TimestepLayout, windows: Sequence[Sequence[Window]]) -> TokenBatch:
        """Rows of windows of one task as tokens, without targets.

        Parameters
        ----------
        layout : TimestepLayout
            The layout of the task.
        windows : sequence of sequence of Window
            The windows of each row, all with entry 0 and task 0.

        Returns
        -------
        TokenBatch
            Its rows are as long as the longest needs.

        Raises
        ------
        DataError
            If a window lacks a field or has a value without encoding.
        """
        rows = np.arange(len(windows))
        batch = assemble(0, rows, windows, [{0: layout}], self.vocabulary, self.text, training=False)
        return batch.without_targets()
