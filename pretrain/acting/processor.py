"""Processor: what a policy needs besides its weights, to lay out histories and to decode actions. No dataset, no torch.

The same code (`tiphys.pretrain.tokens.sequence`) lays out a history and a training window, so acting and training cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError, TaskSpec, Window
from tiphys.dataio.stored import number, stored, task_specs
from tiphys.pretrain.acting.demand import Demand, shows_histogram, shows_return
from tiphys.pretrain.acting.fill import Filling, query_of
from tiphys.pretrain.acting.history import History
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.codec import from_unit
from tiphys.pretrain.tokens.id_codecs import Bins, Integers, Quantiles
from tiphys.pretrain.tokens.sequence import assemble
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import TimestepLayout
from tiphys.pretrain.tokens.vector_codecs import Affine
from tiphys.pretrain.tokens.vocabulary import Vocabulary
from tiphys.recipes.target_return import TargetReturn

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
    return_quantiles: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


ANSWERS_RETURN = "sample"  # the rule of acting that chooses a return before each action


def _layouts(objective: Any, where: str, vocabulary: Vocabulary, length: int) -> dict[str, TimestepLayout]:
    """The layouts of an objective, by task. Raises DataError if one is not valid or does not fit the vocabulary."""
    if not isinstance(objective, Mapping) or not isinstance(objective.get("timesteps"), Mapping):
        raise DataError(f"{where}: it has no timesteps")
    target = objective.get("target_return")
    if not isinstance(target, str):  # a multiple of the best return
        number(target, f"{where}, target_return", -1e300, 1e300)
    else:
        _target(target, f"{where}, target_return")
    number(objective.get("prompt_steps"), f"{where}, prompt_steps", 0, 1 << 24)
    acting = objective.get("acting", ["next", {}])
    if not (isinstance(acting, (list, tuple)) and len(acting) == 2 and isinstance(acting[1], Mapping)):
        raise DataError(f"{where}, acting: it is {acting!r}, not the name of a rule and its options")
    out = {}
    for task, values in objective["timesteps"].items():
        out[task] = TimestepLayout.from_dict(values, f"{where}, task {task!r}")
        out[task].check(vocabulary, length, f"{where}, task {task!r}")
    return out


def _target(given: float | str, where: str) -> TargetReturn:
    try:
        return TargetReturn.parse(given)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


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
        Objective -> {"paradigm", "target_return", "prompt_steps", …}. `target_return` is a multiple of the best return in the
        data, or a text that `TargetReturn.parse` reads. `takes_goal` is there, and true, if it acts towards a goal. `acting` is
        there, the name of its rule and its options, if the action is not simply answered one token after another.
    best_return : mapping of str to float
        Task -> best return in the data, in rewards.
    length : int
        Most positions of a row.
    return_quantiles : mapping of str to sequence of float
        Task -> quantiles of the returns in the data, at equally spaced levels from 0 to 1. A task may be absent.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tasks: Mapping[str, TaskSpec],
        layouts: Mapping[str, Mapping[str, TimestepLayout]],
        objectives: Mapping[str, Mapping[str, Any]],
        best_return: Mapping[str, float],
        length: int,
        return_quantiles: Mapping[str, Sequence[float]] | None = None,
    ):
        self.vocabulary, self.tasks, self.layouts = vocabulary, tasks, layouts
        self.objectives, self.best_return, self.length = objectives, best_return, length
        self.return_quantiles = return_quantiles or {}
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
            vocabulary,
            {task.name: task for task in tasks},
            layouts,
            parts.objectives,
            parts.best_return,
            length,
            parts.return_quantiles,
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
            **(
                {"return_quantiles": {t: list(q) for t, q in self.return_quantiles.items()}}
                if self.return_quantiles
                else {}
            ),
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

    def used_fields(self, task: str, objective: str = "") -> frozenset[str]:
        """Names of the fields that a policy sees and predicts when it acts in a task.

        Parameters
        ----------
        task, objective : str
            Their names; no objective: the first that the task was trained with.

        Raises
        ------
        KeyError
            If the policy was not trained on the task.
        """
        layout = self.layouts[objective or self.objective(task)][task]
        shown = frozenset(e.field for e in layout.elements if e.field) | frozenset(layout.preamble)
        return shown | frozenset(e.to for e in layout.elements if e.to)

    def history(
        self,
        task: str,
        environments: int = 1,
        *,
        objective: str = "",
        target_return: float | str | Sequence[float | str] | None = None,
        prompt: Window | None = None,
        hop: bool = False,
        query: str = "",
        goal: Mapping[str, Any] | None = None,
        future: Window | Sequence[Window] | None = None,
        remainder: bool = True,
        reserve: int = 0,
    ) -> History:
        """An empty history of a batch of environments of one task.

        Parameters
        ----------
        task : str
            Name of the task.
        environments : int
            Number of environments; for a task of several agents, of agents: those of an environment follow each other.
        objective : str
            The objective to act with; "": the first that the task was trained with.
        target_return : float, str, or a sequence of these, optional
            Return of an episode to ask for: rewards (``450``), a multiple of the best return in the data (``"1.2x"``) or a
            quantile of its returns (``"q0.9"``); a sequence has one for each environment. None: as the recipe says.
        prompt : Window, optional
            A demonstration of the task. Its last steps stand before each history.
        hop : bool
            Whether a full window drops its older half, instead of its oldest steps.
        goal : mapping, optional
            The fields of an observation to reach, for objectives that act towards a goal.
        future : Window, or a sequence of them, optional
            A whole episode whose histogram is to be matched (gdt), or whose observations are to be imitated (bdt); a sequence has
            one for each environment.
        remainder : bool
            What of it is demanded at a step: what the environment has left of it (True), or what that episode had left then.

        query : str
            What an objective that fills in hidden parts is asked: a key of `hiding.QUERIES`; "": as the recipe says.
        reserve : int
            Steps that a full window keeps free, for a plan.

        Raises
        ------
        KeyError
            If the policy was not trained on the task, or not with this objective.
        DataError
            If the task has no actions, if the objective takes no target return or no goal but gets one, or if the target return
            is none, or is not one that the policy can be told.
        """
        name = objective or self.objective(task)
        if task not in self.layouts.get(name, {}):
            known = ", ".join(name for name, by_task in self.layouts.items() if task in by_task)
            raise KeyError(f"task {task!r} was not trained with objective {name!r}, but with {known or 'none'}")
        learnt = self.layouts[name][task]
        layout = learnt.acting()
        if self.rule(name)[0] == "compare":
            raise DataError(
                f"task {task!r}, objective {name!r}: it does not act; `Policy.match` says how well texts fit what was seen"
            )
        if not layout.has_actions:
            raise DataError(f"task {task!r} has no actions, so a policy cannot act in it")
        where, (rule, stated) = f"task {task!r}, objective {name!r}", self.rule(name)
        if rule == "label":
            raise DataError(
                f"{where}: it needs what comes after an action, so it cannot act; let it label data: tiphys label"
            )
        if query and rule != "fill":
            raise DataError(f"{where}: it takes no query, because it does not fill in hidden parts")
        asked = self.asked(task, name, target_return)
        if isinstance(asked, list) and len(asked) != environments:
            raise DataError(
                f"{len(asked)} target returns for {environments} environments; give one for each, or one for all"
            )
        if goal is not None and not self.takes_goal(name):
            raise DataError(f"task {task!r}: objective {name!r} does not act towards a goal, so it takes none")
        if prompt is not None:
            prompt = self.prompt(task, name, prompt)
        available = {e.field: e.available for e in learnt.elements if e.available}
        if rule == "fill":
            query = query_of(str(stated.get("query", "bc")), query, goal, learnt.hiding, where)
            return Filling(self, layout, environments, asked, prompt, goal, query, available)
        futures = self._futures(task, name, future, environments)
        element = next(filter(shows_histogram, learnt.elements), None)
        demands = [] if element is None else [Demand(element, one, remainder) for one in futures]
        return History(
            self,
            layout,
            environments,
            asked,
            prompt,
            hop,
            goal,
            demands,
            references=() if demands else futures,
            learnt=learnt,
            answers_return=rule == ANSWERS_RETURN,
            reserve=reserve,
            predicts_end=learnt.predicts_end,
            available=available,
        )

    def rule(self, objective: str) -> tuple[str, Mapping[str, Any]]:
        """The rule that an objective acts by, and its options."""
        name, options = self.objectives[objective].get("acting", ("next", {}))
        return name, options

    def _futures(
        self, task: str, objective: str, future: Window | Sequence[Window] | None, environments: int
    ) -> list[Window]:
        """The episode that each environment is to match or imitate; none if the objective does not act on what is to come."""
        where = f"task {task!r}, objective {objective!r}"
        if not self.takes_future(task, objective):
            if future is not None:
                raise DataError(f"{where}: it shows the model nothing of the future, so it takes no `future`")
            return []
        if future is None:
            raise DataError(
                f"{where}: it acts on what is to come; give an episode to match: `policy.reset(task, future=window)`"
            )
        each = [future] * environments if isinstance(future, Window) else list(future)
        if len(each) != environments:
            raise DataError(f"{where}: {len(each)} futures for {environments} environments; give one for each")
        if short := next((one for one in each if not one.steps), None):
            raise DataError(f"{where}: the episode {short.episode!r} that is to be matched has no step")
        return each

    def takes_future(self, task: str, objective: str) -> bool:
        """Whether an objective acts towards an episode that is to be matched or imitated."""
        shows = any(map(shows_histogram, self.layouts[objective][task].elements))
        return shows or self.rule(objective)[0] == "imitate"

    def takes_goal(self, objective: str) -> bool:
        """Whether an objective acts towards a goal."""
        return self.objectives[objective].get("takes_goal") is True

    def asked(self, task: str, objective: str, target_return: Any = None) -> Any:
        """The return in rewards that a policy asks for; a list for a sequence.

        Parameters
        ----------
        task, objective : str
            Their names.
        target_return : float, str, or a sequence of these, optional
            As in `history`.

        Raises
        ------
        DataError
            As in `history`.
        """
        where, best = f"task {task!r}, objective {objective!r}", float(self.best_return.get(task, 0.0))
        if isinstance(target_return, Sequence) and not isinstance(target_return, str):
            return [self.asked(task, objective, one) for one in target_return]
        if target_return is None:
            stated = self.objectives[objective]["target_return"]
            target = TargetReturn.parse(stated) if isinstance(stated, str) else TargetReturn("best", float(stated))
        else:
            target = _target(target_return, where)
            shown = any(map(shows_return, self.layouts[objective][task].elements))
            if not shown or self.rule(objective)[0] == ANSWERS_RETURN:
                why = "it chooses the returns itself" if shown else "it shows the model no returns"
                raise DataError(f"{where}: {why}, so it takes no target return")
            if problem := target.problem(best):
                raise DataError(f"{where}: {problem}")
        try:
            value = target.of(best, self.return_quantiles.get(task, ()))
        except ValueError as error:
            raise DataError(f"{where}: target return {error}") from None
        if target_return is not None:
            self._check_told(objective, task, value, where)
        return value

    def _check_told(self, objective: str, task: str, value: float, where: str) -> None:
        """Raises DataError if the codec of the returns would clamp a value, so that another return is asked for."""
        codec = next(e.codec for e in self.layouts[objective][task].elements if e.role == "return")
        if isinstance(codec, Affine):
            ends = np.array([-codec.limit, codec.limit])
            low, high = from_unit(ends, np.asarray(codec.low, np.float64), np.asarray(codec.high, np.float64))
        elif isinstance(codec, Bins) and not codec.companded:
            low, high = codec.low[0], codec.high[0]
        elif isinstance(codec, Integers):
            low, high = codec.low, codec.high
        elif isinstance(codec, Quantiles):
            low, high = codec.edges[0][0], codec.edges[0][-1]
        else:
            return
        slack = 1e-6 * max(abs(low), abs(high))
        if not low - slack <= value <= high + slack:
            raise DataError(
                f"{where}: a target return of {value:g} is beyond what the policy can be told, {low:g} to {high:g}"
            )

    def prompt(self, task: str, objective: str, window: Window) -> Window:
        """The last steps of a demonstration, as many as a prompt may have.

        Parameters
        ----------
        task, objective : str
            Their names.
        window : Window
            The demonstration.
        """
        layout, steps = self.layouts[objective][task], int(self.objectives[objective]["prompt_steps"])
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
