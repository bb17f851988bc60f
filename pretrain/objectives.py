"""Objectives: the objectives of a recipe over its datasets. They say how many tokens a window takes, and make its tokens."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import BadValue, DataError, FieldSpec, Needs, TaskSpec, Window
from tiphys.dataio.stored import number as within
from tiphys.pretrain.tokens import text_tokenizers
from tiphys.pretrain.tokens.clips import AFTER, are_clips, as_clips, without_clip
from tiphys.pretrain.tokens.codecs import Bins, Chunk, Codec, Discrete, Integers, Quantiles, Sign
from tiphys.pretrain.tokens.encoding import OPTIONS, Encoding, Ranges
from tiphys.pretrain.tokens.frames import Frame
from tiphys.pretrain.tokens.paradigms import (
    ACTING_OPTIONS,
    PARADIGMS,
    TAKES_GOAL,
    Paradigm,
    hiding_errors,
    paradigm_errors,
    table,
)
from tiphys.pretrain.tokens.sequence import Layouts, assemble
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import Element, TimestepLayout
from tiphys.pretrain.tokens.vocabulary import CONTINUOUS_BINS, DISCRETE_VALUES, EmbedderSpec, Vocabulary
from tiphys.recipes.target_return import TargetReturn

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.plan.cost import Savings
    from tiphys.dataio.sampling import EntryLengths
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.recipes.schema import Entry, Objective, Recipe

__all__ = ["Objectives", "table"]

VERSION = 2  # of processor.json
LEAVE_OUT = "set data.on_bad_value=quarantine, so that training leaves such episodes out"
_TEXTS_AT_ONCE = 1 << 10
_NO_LIMIT = 1 << 30  # steps of a window that only the context bounds
_MOST_IDS = 1 << 16  # of one range of the vocabulary
_RETURN_LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class _MixtureEntry:
    """One entry of the mixture, with its objective, its dataset and the tasks that are trained."""

    settings: Entry  # of the recipe
    name: str  # of the objective
    objective: Objective
    paradigm: Paradigm
    index: EpisodeIndex
    tasks: tuple[int, ...]  # the tasks that are trained, as numbers in the index

    def __iter__(self) -> Iterator[tuple[int, TaskSpec]]:
        return ((i, self.index.tasks[i]) for i in self.tasks)


@dataclass(frozen=True)
class _Returns:
    """The best return and the largest absolute return of a task's episodes. Returns that are not finite do not count.

    `quantiles`: at _RETURN_LEVELS; empty if unknown (objectives of an earlier version).
    """

    best: float
    largest: float
    quantiles: tuple[float, ...] = ()


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
        entries = [_mixture_entry(recipe, entry, index) for entry, index in zip(mixture, indexes, strict=True)]
        if not entries:
            raise DataError("data.mixture: it has no entry, so there is nothing to train on; add a dataset")
        self._entries: list[_MixtureEntry] | None = entries
        self.tasks = _tasks(entries)
        self.length = max(entry.objective.context for entry in entries)
        number = {task.name: i for i, task in enumerate(self.tasks)}
        self._numbers = [_numbers(entry, number) for entry in entries]
        _check_names(entries)
        self._clipped: dict[str, float] = {}
        self._returns = {task.name: _returns(entries, task.name) for task in self.tasks}
        measured = _Measured(entries)
        definition = _tokenizer(recipe, entries)
        self.text = TextTokenizer(definition)
        text = recipe.model.text_vocabulary or self.text.size
        # The codecs decide how large the ranges are, and the ranges decide the ids of the codecs: so the layouts are made twice.
        continuous, discrete = _sizes(self._layouts(entries, number, Ranges(0, _MOST_IDS, 0, _MOST_IDS), measured))
        plain = Vocabulary.build(text, continuous=continuous, discrete=discrete)
        ranges = Ranges(plain.range("continuous")[0], continuous, plain.range("discrete")[0], discrete)
        self.layouts = self._layouts(entries, number, ranges, measured)
        embedders, regressions, chunks = _heads(self.layouts)
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
        self.prompts = [_prompt(entry) for entry in entries]

    def _layouts(
        self, entries: Sequence[_MixtureEntry], number: Mapping[str, int], ranges: Ranges, measured: _Measured
    ) -> list[dict[int, TimestepLayout]]:
        """Mixture entry -> task -> its layout."""
        found = _statistics(entries)
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
                by_task[number[task.name]] = as_clips(encoding.layout(number[task.name], weight), task)
                for field in encoding.shown("action"):
                    self._clipped[f"{task.name}/{field.name}"] = encoding.clipped(field)
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

    def _entry(self, entry: int) -> _MixtureEntry:
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
        from tiphys.dataio.plan.cost import StepCost
        from tiphys.dataio.sampling import EntryLengths

        line, numbers = self._entry(entry), self._numbers[entry]
        index, number = line.index, len(line.index.tasks)
        units, task_of = np.maximum(np.asarray(index.steps, np.int64), 0), np.asarray(index.task)
        fixed, costs = np.zeros(len(units), np.int64), [StepCost.plain(1)] * number
        window, prompt_units = np.ones(number, np.int32), np.ones(number, np.int32)
        prompt, every = np.zeros((2, number), np.float32)
        for i in line.tasks:
            layout = self.layouts[entry][int(numbers[i])]
            mine = task_of == i if number > 1 else np.ones(len(units), bool)
            if layout.width:
                costs[i] = StepCost(layout.cadence, layout.chunk)
            window[i] = layout.window or _NO_LIMIT
            texts = self._preambles(line, layout, mine)
            fixed[mine] = layout.extra + layout.copies * texts
            if layout.document:
                units[mine], fixed[mine] = texts, 1
                window[i] = max(layout.text_limit - 1, 1) if layout.text_limit else _NO_LIMIT
            elif layout.text_last:
                units[mine] = 1
            elif not layout.has_actions:
                units[mine] = np.maximum(units[mine], 1)
            else:  # a prompt is a demonstration
                (every if layout.prompt_steps else prompt)[i] = self.prompts[entry]
                most = line.objective.prompt_steps or line.paradigm.prompt.steps or layout.fit(self.length // 2)
                prompt_units[i] = layout.prompt_steps or max(1, most)
        return EntryLengths(
            units=units,
            window=window,
            context=np.full(number, line.objective.context, np.int32),
            costs=costs,
            fixed=fixed.astype(np.int32),
            prompt=prompt,
            prompt_units=prompt_units,
            savings=self._savings(entry),
            every=every if every.any() else None,
            ends=np.full(number, line.paradigm.prompt.ends, np.float32) if every.any() or prompt.any() else None,
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
            _tasks([*out._entries, entry])
            out._entries.append(entry)
            out._numbers.append(_numbers(entry, number))
            own = {number[t.name]: t for t in index.tasks if t.name in number}
            out.layouts.append({i: as_clips(layout, own[i]) for i, layout in known.items() if i in own})
            out.prompts.append(self.prompts[like])
        return out

    def _preambles(self, line: _MixtureEntry, timestep: TimestepLayout, mine: np.ndarray) -> np.ndarray:
        """int64 [episodes of the mask `mine`]: number of ids of the texts that stand once in a window."""
        total = np.zeros(int(mine.sum()), np.int64)
        limit = 0 if timestep.document else timestep.text_limit
        for field in timestep.preamble:
            codes, texts = line.index.text(field)
            codes = np.asarray(codes)[mine]
            if (codes < 0).any():
                at = int(np.flatnonzero(mine)[int((codes < 0).argmax())])
                raise DataError(f"{line.index.url}: episode {line.index.id(at)!r} has no text in field {field!r}")
            size = np.zeros(len(texts), np.int64)
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                some = texts[start : start + _TEXTS_AT_ONCE]
                size[start : start + len(some)] = self.text.count(some, limit)
            total += size[codes]
        return total

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
        self._returns = {name: _Returns(r[0], r[1], tuple(r[2:])) for name, r in state["returns"].items()}

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


def _stored_acting(entry: _MixtureEntry) -> dict[str, Any]:
    """The rule of acting in processor.json, and its options; nothing if the tokens of an action are simply answered in order."""
    rule, options = entry.paradigm.acting
    given = {name: value for name, value in entry.objective.options.items() if name in options}
    return {} if rule in ("next", "ask") else {"acting": [rule, {**options, **given}]}


def _fixed_weight(weight: float | str) -> float:
    """The loss weight that targets have in a batch. One that is chosen (`auto`) is multiplied in while training."""
    return 1.0 if isinstance(weight, str) else weight


def _stored_target(entry: _MixtureEntry) -> float | str:
    """The target return in processor.json: a number is a multiple of the best return there."""
    try:
        target = TargetReturn.parse(entry.objective.target_return)
    except ValueError as error:
        raise DataError(f"objectives.{entry.name}.target_return: {error}") from None
    return target.value if target.kind == "best" else str(entry.objective.target_return)


def _mixture_entry(recipe: Recipe, entry: Entry, index: EpisodeIndex) -> _MixtureEntry:
    from tiphys.recipes.schema import Objective

    name = entry.objective
    objective = recipe.objectives[name] if name in recipe.objectives else Objective()
    for key, reason in paradigm_errors(name, objective.paradigm):
        raise DataError(f"{key}: {reason}")
    paradigm = PARADIGMS[objective.paradigm or name]
    for key, reason in hiding_errors(name, paradigm, objective.options):
        raise DataError(f"{key}: {reason}")
    wanted = list(entry.tasks) or ["*"]
    tasks = tuple(i for i, t in enumerate(index.tasks) if any(fnmatchcase(t.name, pattern) for pattern in wanted))
    if not tasks:
        has = ", ".join(t.name for t in index.tasks)
        raise DataError(f"data.mixture: no task of {entry.dataset} matches {', '.join(wanted)}; it has {has}")
    return _MixtureEntry(entry, name, objective, paradigm, index, tasks)


def _tasks(entries: Sequence[_MixtureEntry]) -> tuple[TaskSpec, ...]:
    """Tasks in order of appearance. Raises DataError if two datasets have a task of the same name with different fields."""
    found: dict[str, tuple[TaskSpec, str]] = {}
    for entry in entries:
        for _, declared in entry:
            task = without_clip(declared)
            known, where = found.setdefault(task.name, (task, entry.settings.dataset))
            one, other = ({f.name: f for f in t.fields} for t in (known, task))
            differ = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
            if differ:
                raise DataError(
                    f"task {task.name!r} has other fields in {entry.settings.dataset} than in {where}: {', '.join(differ)}; "
                    "rename one of the tasks, or make the fields equal"
                )
    return tuple(task for task, _ in found.values())


def _check_names(entries: Sequence[_MixtureEntry]) -> None:
    """Raises DataError for an unknown option, and for a pattern that matches no field, because both are typing errors."""
    fields: dict[str, set[str]] = {}
    for entry in entries:
        fields.setdefault(entry.name, set()).update(f.name for _, task in entry for f in task.fields)
    for entry in entries:
        rule, acting = entry.paradigm.acting
        for option, value in entry.objective.options.items():
            if option not in OPTIONS:
                raise DataError(
                    f"objectives.{entry.name}.options: no option {option!r}; the options are {', '.join(OPTIONS)}"
                )
            if option in ACTING_OPTIONS:
                where = f"objectives.{entry.name}.options.{option}"
                if option not in acting:
                    raise DataError(
                        f"{where}: paradigm {entry.paradigm.name!r} acts by {rule!r}, which has no such option"
                    )
                within(value, where, *ACTING_OPTIONS[option][1:])
        for pattern in entry.objective.fields:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in fields[entry.name]):
                has = ", ".join(sorted(fields[entry.name]))
                near = difflib.get_close_matches(pattern, fields[entry.name], n=1)
                hint = (
                    f"did you mean {near[0]!r}? The tasks have" if near else "write one of those that the tasks have:"
                )
                raise DataError(f"objectives.{entry.name}.fields: no field matches {pattern!r}; {hint} {has}")


def _numbers(entry: _MixtureEntry, number: Mapping[str, int]) -> np.ndarray:
    out = np.full(len(entry.index.tasks), -1, np.int32)
    for i, task in entry:
        out[i] = number[task.name]
    return out


def _tokenizer(recipe: Recipe, entries: Sequence[_MixtureEntry]) -> str:
    """The JSON of the text tokenizer that the recipe names, else of one trained on all texts of the datasets."""
    size = recipe.model.text_vocabulary
    if recipe.model.text_tokenizer:
        return text_tokenizers.load(recipe.model.text_tokenizer, size)
    texts: set[str] = set()
    for entry in entries:
        fields = {f.name for _, task in entry for f in task.fields if f.modality == "text" and f.per == "episode"}
        for field in sorted(fields):
            texts.update(entry.index.text(field)[1])
    return text_tokenizers.learn(texts, size or text_tokenizers.MOST_LEARNT)


def _sizes(layouts: Layouts) -> tuple[int, int]:
    """Numbers of continuous and of discrete ids: Gato's, or more if the codecs need more."""
    continuous, discrete = CONTINUOUS_BINS, DISCRETE_VALUES
    for codec in _codecs(layouts):
        if isinstance(codec, Discrete | Integers | Sign):
            discrete = max(discrete, *codec.values)
        elif isinstance(codec, Bins | Quantiles):
            continuous = max(continuous, *(high - codec.first for _, high in codec.choices()))
    return continuous, discrete


def _codecs(layouts: Layouts) -> Iterator[Codec]:
    for by_task in layouts:
        for layout in by_task.values():
            yield from (e.codec for e in layout.elements if e.codec is not None)


def _heads(layouts: Layouts) -> tuple[dict[str, EmbedderSpec], dict[str, int], dict[str, dict[str, Any]]]:
    """The embedders, regression heads and heads of chunks that the layouts of all tasks need."""
    embedders: dict[str, EmbedderSpec] = {}
    for codec in sorted(_codecs(layouts), key=lambda c: c.embedder):
        if codec.embedder:
            spec = codec.embedder_spec()
            embedders[codec.embedder] = embedders.get(codec.embedder, spec).merged(spec, codec.embedder)
    heads = ((e.head, e.codec) for by_task in layouts for t in by_task.values() for e in t.elements if e.head)
    regressions: dict[str, int] = {}
    chunks: dict[str, dict[str, Any]] = {}
    for head, predicted in heads:
        if isinstance(predicted, Chunk):
            if chunks.setdefault(head, predicted.head) != predicted.head:
                raise DataError(
                    f"two objectives predict chunks by the head {head!r} with other sizes: {chunks[head]} and {predicted.head}; "
                    "give them the same `flow`"
                )
        elif predicted is not None:
            regressions[head] = predicted.embedder_spec().shape[0]
    return embedders, regressions, dict(sorted(chunks.items()))


def _needs_quantiles(entry: _MixtureEntry) -> bool:
    """Whether it needs more quantiles than dataset.json has."""
    if entry.objective.head in ("l2", "l1", "flow") or entry.objective.horizon:
        return True
    fields = entry.objective.fields.values()
    coded = (tokens.encoding == "quantile" or tokens.normalise != "auto" for tokens in fields)
    return any(coded) or any(part.code == "quantile" for part in entry.paradigm.timestep)


def _statistics(entries: Sequence[_MixtureEntry]) -> dict[str, dict[str, FieldStatistics]]:
    """Task -> field -> statistics over all datasets that have the task."""
    from tiphys.dataio.statistics import pooled

    found: dict[str, dict[str, list[FieldStatistics]]] = {}
    seen = set()
    exact = any(map(_needs_quantiles, entries))
    for entry in entries:
        for i, task in entry:
            mine = found.setdefault(task.name, {})
            if (entry.index.fingerprint, i) not in seen:
                index = entry.index
                known = index.statistics_with_histograms if exact else index.statistics
                for field, statistics in known.get(task.name, {}).items():
                    mine.setdefault(field, []).append(statistics)
            seen.add((entry.index.fingerprint, i))
    return {task: {field: pooled(some) for field, some in fields.items()} for task, fields in found.items()}


class _Measured:
    """Statistics of relative actions and of discounted returns, over all datasets that have the task. Each is computed once."""

    def __init__(self, entries: Sequence[_MixtureEntry]) -> None:
        self._entries = entries
        self._known: dict[Any, FieldStatistics] = {}

    def framed(self, task: str, field: FieldSpec, frame: Frame, horizon: int) -> FieldStatistics:
        from tiphys.dataio.frame_statistics import frame_statistics

        def measure(index: EpisodeIndex, i: int) -> FieldStatistics:
            return frame_statistics(index, i, field.name, frame.to, frame.columns, horizon)

        return self._over_all(task, (field.name, frame, horizon), measure)

    def discounted(self, task: str, discount: float) -> FieldStatistics:
        from tiphys.dataio.return_statistics import return_statistics

        def measure(index: EpisodeIndex, i: int) -> FieldStatistics:
            return return_statistics(index, i, discount, AFTER if are_clips(index.tasks[i]) else None)

        return self._over_all(task, (discount,), measure)

    def _over_all(
        self, task: str, asked: tuple[Any, ...], measure: Callable[[EpisodeIndex, int], FieldStatistics]
    ) -> FieldStatistics:
        from tiphys.dataio.statistics import pooled

        key = (task, *asked)
        if key not in self._known:
            indexes = {(e.index.fingerprint, i): e.index for e in self._entries for i, t in e if t.name == task}
            self._known[key] = pooled([measure(index, i) for (_, i), index in indexes.items()])
        return self._known[key]


def _returns(entries: Sequence[_MixtureEntry], name: str) -> _Returns:
    parts, seen = [], set()
    for entry in entries:
        for i, task in entry:
            if task.name == name and (entry.index.fingerprint, i) not in seen:
                seen.add((entry.index.fingerprint, i))
                parts.append(np.asarray(entry.index.total_return, np.float64)[np.asarray(entry.index.task) == i])
    returns = np.concatenate(parts)
    returns = returns[np.isfinite(returns)]  # one NaN would make all numbers NaN
    if not len(returns):
        return _Returns(0.0, 0.0)
    quantiles = np.quantile(returns, _RETURN_LEVELS)
    return _Returns(float(returns.max()), float(np.abs(returns).max()), tuple(quantiles.tolist()))


def _prompt(line: _MixtureEntry) -> float:
    return line.paradigm.prompt.share if line.objective.prompt < 0 else line.objective.prompt
