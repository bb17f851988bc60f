"""Objectives: the objectives of a recipe over its datasets. They say how many tokens a window takes, and make its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import BadValue, DataError, Needs, Window
from tiphys.pretrain.tokens.action_codecs import clipped_share
from tiphys.pretrain.tokens.clips import as_clips
from tiphys.pretrain.tokens.encoding import Encoding
from tiphys.pretrain.tokens.entry_statistics import Measured, Returns, returns_of, statistics_of, tokenizer_of
from tiphys.pretrain.tokens.lengths import entry_lengths
from tiphys.pretrain.tokens.mixture_entries import (
    MixtureEntry,
    check_names,
    mixture_entry,
    prompt_share,
    task_numbers,
    tasks_of,
)
from tiphys.pretrain.tokens.paradigm import TAKES_GOAL
from tiphys.pretrain.tokens.paradigms import table
from tiphys.pretrain.tokens.ranges import Ranges, heads_of, range_sizes
from tiphys.pretrain.tokens.sequence import assemble
from tiphys.pretrain.tokens.task_layout import task_layout
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import Element, TimestepLayout
from tiphys.pretrain.tokens.vocabulary import Vocabulary
from tiphys.recipes.target_return import TargetReturn

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.plan.cost import Savings
    from tiphys.dataio.sampling import EntryLengths
    from tiphys.recipes.schema import Recipe

__all__ = ["Objectives", "table"]

VERSION = 2  # of processor.json
LEAVE_OUT = "set data.on_bad_value=quarantine, so that training leaves such episodes out"
_MOST_IDS = 1 << 16  # of one range of the vocabulary


class Objectives:
    """The objectives of a recipe over its datasets.

    It can be pickled, but without its indexes: `lengths` and `processor` then raise RuntimeError.

    Parameters
    ----------
    recipe : Recipe
        A resolved recipe.
    indexes : sequence of EpisodeIndex
        The dataset of each mixture entry, in the order of ``data.mixture``.

    Attributes
    ----------
    vocabulary : Vocabulary
        The vocabulary of the run.
    length : int
        Positions of a row: the largest ``context`` of the objectives.
    tasks : tuple of TaskSpec
        Every task that is trained, in order of appearance. Window.task and TokenBatch.task are indexes into it.
    layouts : list of dict of int to TimestepLayout
        Mixture entry -> task (index into ``tasks``) -> how its timesteps become positions.
    prompts : list of float
        For each mixture entry, the share of rows that begin with a prompt, or of windows that have one of their own.
    text : TextTokenizer
        The text tokenizer of the run.

    Raises
    ------
    DataError
        If a task cannot be trained as the recipe says: an unknown paradigm, a field without encoding, a context that cannot
        hold one timestep, too many clipped actions, or a name in the recipe that nothing matches.
    """

    def __init__(self, recipe: Recipe, indexes: Sequence[EpisodeIndex]):
        mixture = recipe.data.mixture
        entries = [mixture_entry(recipe, entry, index) for entry, index in zip(mixture, indexes, strict=True)]
        if not entries:
            raise DataError("data.mixture: it has no entry, so there is nothing to train on; add a dataset")
        self._entries: list[MixtureEntry] | None = entries
        self.tasks = tasks_of(entries)
        self.length = max(entry.objective.context for entry in entries)
        number = {task.name: i for i, task in enumerate(self.tasks)}
        self._numbers = [task_numbers(entry, number) for entry in entries]
        check_names(entries)
        self._clipped: dict[str, float] = {}
        self._returns = {task.name: returns_of(entries, task.name) for task in self.tasks}
        measured = Measured(entries)
        definition = tokenizer_of(recipe, entries)
        self.text = TextTokenizer(definition)
        text = recipe.model.text_vocabulary or self.text.size
        # The codecs decide how large the ranges are, and the ranges decide the ids of the codecs: so the layouts are made twice.
        continuous, discrete = range_sizes(self._layouts(entries, number, Ranges(0, _MOST_IDS, 0, _MOST_IDS), measured))
        plain = Vocabulary.build(text, continuous=continuous, discrete=discrete)
        ranges = Ranges(plain.range("continuous")[0], continuous, plain.range("discrete")[0], discrete)
        self.layouts = self._layouts(entries, number, ranges, measured)
        embedders, regressions, chunks = heads_of(self.layouts)
        pairs = any(layout.loss == "pairs" for by_task in self.layouts for layout in by_task.values())
        self.vocabulary = replace(
            plain,
            embedders=embedders,
            regressions=regressions,
            tasks=tuple(number),
            text_tokenizer=definition,
            pairs=pairs,
            chunks=chunks,
        )
        self.prompts = [prompt_share(entry) for entry in entries]

    def _layouts(
        self, entries: Sequence[MixtureEntry], number: Mapping[str, int], ranges: Ranges, measured: Measured
    ) -> list[dict[int, TimestepLayout]]:
        """Mixture entry -> task -> its layout."""
        found = statistics_of(entries)
        layouts: list[dict[int, TimestepLayout]] = []
        superset = any(entry.index.document.get("statistics_of_superset") for entry in entries)
        for entry in entries:
            by_task = {}
            for _, task in entry:
                largest = self._returns[task.name].largest
                encoding = Encoding(
                    task,
                    entry.objective,
                    entry.paradigm,
                    found[task.name],
                    ranges,
                    largest,
                    superset,
                    partial(measured.framed, task.name),
                    partial(measured.discounted, task.name),
                )
                weight = _fixed_weight(entry.settings.loss_weight)
                by_task[number[task.name]] = as_clips(task_layout(encoding, number[task.name], weight), task)
                for field in encoding.shown("action"):
                    self._clipped[f"{task.name}/{field.name}"] = clipped_share(encoding, field)
            layouts.append(by_task)
        return layouts

    def number(self, task: str) -> int:
        """The number of a task: its index in `tasks`.

        Raises
        ------
        KeyError
            If the task is not trained.
        """
        for number, known in enumerate(self.tasks):
            if known.name == task:
                return number
        raise KeyError(f"task {task!r} is not trained; the tasks are {', '.join(t.name for t in self.tasks)}")

    def clipped(self) -> dict[str, float]:
        """Share of clamped values of each action field in the data, by "task/field"."""
        return dict(self._clipped)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_entries": None}

    def _entry(self, entry: int) -> MixtureEntry:
        if self._entries is None:
            raise RuntimeError(
                "these Objectives were unpickled and have no indexes: call `lengths` and `processor` in the process that "
                "made them"
            )
        return self._entries[entry]

    def index(self, entry: int) -> EpisodeIndex:
        """The dataset of a mixture entry."""
        return self._entry(entry).index

    def task_numbers(self, entry: int) -> np.ndarray:
        """Numbers of the tasks of a mixture entry.

        Parameters
        ----------
        entry : int
            The mixture entry.

        Returns
        -------
        ndarray, int32 [tasks of the entry's dataset]
            Index into ``tasks``; −1 for a task that is not trained.
        """
        return self._numbers[entry]

    def lengths(self, entry: int) -> EntryLengths:
        """How many tokens the windows of a mixture entry take, for the sampling plan.

        Parameters
        ----------
        entry : int
            The mixture entry.

        Returns
        -------
        EntryLengths
            Its arrays by task have an element for each task of the entry's dataset.

        Raises
        ------
        DataError
            If an episode lacks a text that its task has.
        """
        return entry_lengths(
            self._entry(entry),
            self._numbers[entry],
            self.layouts[entry],
            self.prompts[entry],
            self.length,
            self.text,
            self._savings(entry),
        )

    def step_texts(self, entry: int) -> dict[str, list[tuple[int, Element]]]:
        """The texts of a mixture entry that change from step to step: field -> (task, element) of each task that shows it.

        Tasks are numbers in the entry's dataset.
        """
        line, numbers = self._entry(entry), self._numbers[entry]
        found: dict[str, list[tuple[int, Element]]] = {}
        for i in line.tasks:
            for element in self.layouts[entry][int(numbers[i])].step_texts:
                found.setdefault(element.field, []).append((i, element))
        return found

    def _savings(self, entry: int) -> Savings | None:
        """What the steps of an entry take less than planned, by the token counts beside its dataset; None without counts."""
        from tiphys.dataio import step_counts

        index = self._entry(entry).index
        task_of, parts = np.asarray(index.task), []
        for field, shown in self.step_texts(entry).items():
            counts = step_counts.read(index, field, self.text.definition)
            if counts is not None:
                parts += [(task_of == task, counts, element.size, element.stride) for task, element in shown]
        return step_counts.savings(index, parts) if parts else None

    def joined(self, added: Sequence[tuple[EpisodeIndex, int]]) -> Objectives:
        """These objectives with further datasets, learned as mixture entries that exist. The vocabulary stays as it is.

        Parameters
        ----------
        added : sequence of (EpisodeIndex, int)
            Each dataset, and the mixture entry whose objective and layouts it takes over. They get the next entry numbers.

        Raises
        ------
        DataError
            If a dataset has none of that entry's tasks, or a task whose fields differ.
        """
        out = copy(self)
        out._entries, out._numbers = list(self._entries or ()), list(self._numbers)
        out.layouts, out.prompts = list(self.layouts), list(self.prompts)
        number = {task.name: i for i, task in enumerate(self.tasks)}
        for index, like in added:
            known = self.layouts[like]
            tasks = tuple(i for i, t in enumerate(index.tasks) if number.get(t.name, -1) in known)
            if not tasks:
                names = ", ".join(self.tasks[i].name for i in known)
                raise DataError(
                    f"{index.url}: it has none of the tasks {names} of the mixture entry that it is learned like"
                )
            entry = replace(self._entry(like), index=index, tasks=tasks)
            tasks_of([*out._entries, entry])
            out._entries.append(entry)
            out._numbers.append(task_numbers(entry, number))
            own = {number[t.name]: t for t in index.tasks if t.name in number}
            out.layouts.append({i: as_clips(layout, own[i]) for i, layout in known.items() if i in own})
            out.prompts.append(self.prompts[like])
        return out

    def needs(self, entry: int) -> Needs:
        """The fields that the tokens of a mixture entry are made from, and the rows after a window. Nothing else is fetched."""
        fields: dict[str, int] = {}  # with their strides
        after = 0
        for layout in self.layouts[entry].values():
            for field in layout.fields:
                fields[field] = math.gcd(fields.get(field, 0), layout.stride(field))
            after = max(after, layout.after)
        strides = tuple((field, stride) for field, stride in fields.items() if stride > 1)
        return Needs(fields=tuple(fields), after=after, strides=strides)

    def make_batch(
        self,
        step: int,
        rows: np.ndarray,
        windows: Sequence[Sequence[Window]],
        *,
        seed: int,
        training: bool = True,
        on_bad_value: str = "refuse",
    ) -> dict[str, np.ndarray]:
        """The TokenBatch of some rows, as arrays.

        The result depends on (seed, step, rows, windows) alone. A row is the same whatever rows are made with it.

        Parameters
        ----------
        step : int
            The training step.
        rows : ndarray, int64 [n]
            Numbers of the rows in the global batch.
        windows : sequence of sequence of Window
            The windows of each row, in order; a prompt stands before the window that it belongs to.
        seed : int
            Seed of the random places of image patches.
        training : bool
            False: each patch has the middle of its place instead of a random one.
        on_bad_value : "refuse" or "quarantine"
            What the error says of a value that cannot be learned from: that the run ends, or (for a loader, which then leaves the
            episode out) only what is wrong.

        Returns
        -------
        dict of str to ndarray
            `TokenBatch.to_arrays`.

        Raises
        ------
        BadValue
            If a value has no encoding, or a return is not finite, and `on_bad_value` is "quarantine".
        DataError
            If a window lacks a field, if a row needs more than ``length`` positions, or, with "refuse", if there is a bad value.
        """
        try:
            batch = assemble(
                step,
                rows,
                windows,
                self.layouts,
                self.vocabulary,
                self.text,
                length=self.length,
                seed=seed,
                training=training,
            )
        except BadValue as error:
            if on_bad_value == "quarantine":
                raise
            raise DataError(f"{error}; correct or remove the episode, or {LEAVE_OUT}") from None
        return batch.to_arrays()

    def state(self) -> dict[str, Any]:
        """What decides which tokens a value becomes, as JSON; for `restore`."""
        return {
            "vocabulary": self.vocabulary.to_dict(),
            "layouts": [[layout.to_dict() for layout in by_task.values()] for by_task in self.layouts],
            "returns": {name: [r.best, r.largest, *r.quantiles] for name, r in self._returns.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Encode values as other objectives did, which had the same recipe and tasks: with their vocabulary, means and ranges.

        Parameters
        ----------
        state : mapping
            The `state` of those objectives.
        """
        self.vocabulary = Vocabulary.from_dict(state["vocabulary"])
        self.text = TextTokenizer(self.vocabulary.text_tokenizer)
        layouts = [[TimestepLayout.from_dict(values) for values in by_task] for by_task in state["layouts"]]
        self.layouts = [{layout.number: layout for layout in by_task} for by_task in layouts]
        self._returns = {name: Returns(r[0], r[1], tuple(r[2:])) for name, r in state["returns"].items()}

    def processor(self) -> dict[str, Any]:
        """Everything that a policy needs to act besides its weights, as JSON: the content of processor.json.

        `tiphys.pretrain.acting.processor.Processor.from_dict` reads it.
        """
        objectives: dict[str, Any] = {}
        for number, layouts in enumerate(self.layouts):
            entry = self._entry(number)
            mine = objectives.setdefault(
                entry.name,
                {
                    "paradigm": entry.paradigm.name,
                    "target_return": _stored_target(entry),
                    "prompt_steps": entry.objective.prompt_steps or entry.paradigm.prompt.steps,
                    **({"takes_goal": True} if entry.paradigm.acting[0] in TAKES_GOAL else {}),
                    **_stored_acting(entry),
                    "timesteps": {},
                },
            )
            for layout in layouts.values():
                mine["timesteps"].setdefault(layout.task, replace(layout, clipped=False).to_dict())
        asked = {n for o in objectives.values() for n, layout in o["timesteps"].items() if _shows_returns(layout)}
        quantiles = {name: list(r.quantiles) for name, r in self._returns.items() if name in asked and r.quantiles}
        return {
            "version": VERSION,
            "length": self.length,
            "vocabulary": self.vocabulary.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            "best_return": {name: returns.best for name, returns in self._returns.items()},
            **({"return_quantiles": quantiles} if quantiles else {}),
            "objectives": objectives,
        }


def _shows_returns(layout: Mapping[str, Any]) -> bool:
    return any(element["role"] == "return" for element in layout["elements"])


def _stored_acting(entry: MixtureEntry) -> dict[str, Any]:
    """The rule of acting in processor.json, and its options; nothing if the tokens of an action are simply answered in order."""
    rule, options = entry.paradigm.acting
    given = {name: value for name, value in entry.objective.options.items() if name in options}
    return {} if rule in ("next", "ask") else {"acting": [rule, {**options, **given}]}


def _fixed_weight(weight: float | str) -> float:
    """The loss weight that targets have in a batch. One that is chosen (`auto`) is multiplied in while training."""
    return 1.0 if isinstance(weight, str) else weight


def _stored_target(entry: MixtureEntry) -> float | str:
    """The target return in processor.json: a number is a multiple of the best return there."""
    try:
        target = TargetReturn.parse(entry.objective.target_return)
    except ValueError as error:
        raise DataError(f"objectives.{entry.name}.target_return: {error}") from None
    return target.value if target.kind == "best" else str(entry.objective.target_return)
