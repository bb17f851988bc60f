"""Processor: what a policy needs beside its weights, to lay out histories and to read actions. No dataset, no torch.

The same code (`tiphys.pretrain.tokens.sequence`) lays out a history and a training window, so acting and training cannot diverge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, TaskSpec, Window
from tiphys.pretrain.acting.history import History
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.sequence import assemble
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import Timestep
from tiphys.pretrain.tokens.vocabulary import Vocabulary


class Processor:
    """What a policy needs beside its weights. JSON: `from_dict(Objectives.processor())`.

    tasks        name -> TaskSpec
    objectives   name -> {"paradigm", "target_return", "prompt_steps", "timesteps": {task: …}}
    best_return  name -> best return of the task in the data
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tasks: Mapping[str, TaskSpec],
        timesteps: Mapping[str, Mapping[str, Timestep]],
        objectives: Mapping[str, Mapping[str, Any]],
        best_return: Mapping[str, float],
        length: int,
    ):
        self.vocabulary, self.tasks, self.timesteps = vocabulary, tasks, timesteps
        self.objectives, self.best_return, self.length = objectives, best_return, length
        self.text = TextTokenizer(vocabulary.text_tokenizer)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Processor:
        if values.get("version") != 1:
            raise DataError(f"the processor has version {values.get('version')!r}, this Tiphys reads 1; update Tiphys")
        timesteps = {
            name: {task: Timestep.from_dict(t) for task, t in objective["timesteps"].items()}
            for name, objective in values["objectives"].items()
        }
        return cls(
            Vocabulary.from_dict(values["vocabulary"]),
            {task["name"]: TaskSpec(**task) for task in values["tasks"]},
            timesteps,
            values["objectives"],
            values["best_return"],
            int(values["length"]),
        )

    def to_dict(self) -> dict[str, Any]:
        objectives = {
            name: {**objective, "timesteps": {task: t.to_dict() for task, t in self.timesteps[name].items()}}
            for name, objective in self.objectives.items()
        }
        return {
            "version": 1,
            "length": self.length,
            "vocabulary": self.vocabulary.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks.values()],
            "best_return": dict(self.best_return),
            "objectives": objectives,
        }

    def objective(self, task: str) -> str:
        """The first objective that was learned on a task; KeyError with the known tasks otherwise."""
        for name, timesteps in self.timesteps.items():
            if task in timesteps:
                return name
        raise KeyError(f"this policy knows no task {task!r}; it knows {', '.join(self.tasks)}")

    def history(
        self,
        task: str,
        environments: int = 1,
        *,
        objective: str = "",
        target_return: float | None = None,
        prompt: Window | None = None,
    ) -> History:
        """An empty history of a batch of environments of one task.

        target_return  of an episode, in rewards; None: the recipe's multiple of the best return in the data. Used where
                       the objective shows returns
        prompt         a demonstration of the task; its last steps stand before each history
        """
        name = objective or self.objective(task)
        timestep = self.timesteps[name][task]
        if not timestep.acts:
            raise DataError(f"task {task!r} has no actions, so nothing can act in it")
        if target_return is None:
            target_return = float(self.objectives[name]["target_return"]) * float(self.best_return[task])
        if prompt is not None:
            prompt = self._prompt(timestep, prompt, int(self.objectives[name]["prompt_steps"]))
        return History(self, timestep, environments, target_return, prompt)

    def _prompt(self, timestep: Timestep, window: Window, steps: int) -> Window:
        """The last steps of a demonstration, as many as a prompt may have."""
        most = min(
            steps or (self.length // 2) // timestep.width,
            window.steps,
            (self.length - timestep.width) // timestep.width,
        )
        first = window.steps - max(most, 0)
        constant = {e.field for e in timestep.elements if e.constant} | set(timestep.preamble)
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

    def encode(self, timestep: Timestep, windows: Sequence[Sequence[Window]]) -> TokenBatch:
        """TokenBatch of rows of windows of one task (entry 0, task 0), as long as the longest row."""
        rows = np.arange(len(windows))
        return assemble(0, rows, windows, [{0: timestep}], self.vocabulary, self.text, training=False)
