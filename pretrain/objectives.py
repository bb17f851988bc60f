"""Objectives: a recipe's objectives over its datasets: what a window costs and needs, and its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, Needs, TaskSpec, Window
from tiphys.pretrain.tokens import text_tokenizers
from tiphys.pretrain.tokens.codecs import Bins, Codec, Discrete, Quantiles
from tiphys.pretrain.tokens.encoding import OPTIONS, Encoding, Ranges, pooled
from tiphys.pretrain.tokens.paradigms import PARADIGMS, Paradigm, table
from tiphys.pretrain.tokens.sequence import assemble
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import Timestep
from tiphys.pretrain.tokens.vocabulary import CONTINUOUS_BINS, DISCRETE_VALUES, EmbedderSpec, Vocabulary

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.sampling import EntryLengths
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.recipes.schema import Entry, Objective, Recipe

__all__ = ["Objectives", "table"]

_TEXTS_AT_ONCE = 1 << 14
_MOST_IDS = 1 << 16  # of one range


@dataclass(frozen=True)
class _Line:
    """One line of the mixture with what stands behind it."""

    entry: Entry
    name: str  # of the objective
    objective: Objective
    paradigm: Paradigm
    index: EpisodeIndex
    tasks: tuple[int, ...]  # numbers in the index of the tasks that take part

    def __iter__(self) -> Iterator[tuple[int, TaskSpec]]:
        return ((i, self.index.tasks[i]) for i in self.tasks)


@dataclass(frozen=True)
class _Returns:
    """Of a task's episodes: the best return, and the largest absolute one."""

    best: float
    largest: float


class Objectives:
    """The recipe's objectives over its datasets, one index a line of the mixture.

    vocabulary  of the run
    length      positions of a row: the largest context
    tasks       every task that takes part, in order of appearance; Window.task and TokenBatch.task count here

    Picklable without its indexes, which `lengths` alone uses. Raises DataError where a task cannot be learned as the recipe
    says: no paradigm of that name, a field without encoding, a context that cannot hold one timestep, clipped actions.
    """

    def __init__(self, recipe: Recipe, indexes: Sequence[EpisodeIndex]):
        lines = [_line(recipe, entry, index) for entry, index in zip(recipe.data.mixture, indexes, strict=True)]
        if not lines:
            raise DataError("data.mixture: no line, so there is nothing to learn")
        self._lines: list[_Line] | None = lines
        self.tasks = _tasks(lines)
        self.length = max(line.objective.context for line in lines)
        number = {task.name: i for i, task in enumerate(self.tasks)}
        self._numbers = [_numbers(line, number) for line in lines]
        _check_names(lines)
        self._clipped: dict[str, float] = {}
        self._returns = {task.name: _returns(lines, task.name) for task in self.tasks}
        definition, text = _tokenizer(recipe, lines), recipe.model.text_vocabulary
        # the ranges are as large as the codecs want them, and the codecs' ids follow from the ranges
        continuous, discrete = _sizes(self._schemes(lines, number, Ranges(0, _MOST_IDS, 0, _MOST_IDS)))
        plain = Vocabulary.build(text, continuous=continuous, discrete=discrete)
        ranges = Ranges(plain.range("continuous")[0], continuous, plain.range("discrete")[0], discrete)
        self.schemes = self._schemes(lines, number, ranges)
        embedders, regressions = _heads(self.schemes)
        self.vocabulary = replace(
            plain, embedders=embedders, regressions=regressions, tasks=tuple(number), text_tokenizer=definition
        )
        self.text = TextTokenizer(definition)
        self.prompts = [_prompt(line) for line in lines]

    def _schemes(self, lines: Sequence[_Line], number: Mapping[str, int], ranges: Ranges) -> list[dict[int, Timestep]]:
        """line of the mixture -> task -> its timestep."""
        found = _statistics(lines)
        schemes: list[dict[int, Timestep]] = []
        for line in lines:
            timesteps = {}
            for _, task in line:
                largest = self._returns[task.name].largest
                encoding = Encoding(task, line.objective, line.paradigm, found[task.name], ranges, largest)
                timesteps[number[task.name]] = encoding.timestep(number[task.name], line.entry.loss_weight)
                for field in encoding.shown("action"):
                    self._clipped[f"{task.name}/{field.name}"] = encoding.clipped(field)
            schemes.append(timesteps)
        return schemes

    def clipped(self) -> dict[str, float]:
        """ "task/field" -> share of an action field's values in the data that its tokens clamp."""
        return dict(self._clipped)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lines": None}

    def _line(self, entry: int) -> _Line:
        if self._lines is None:
            raise RuntimeError(
                "these Objectives were unpickled: lengths and the processor are asked where the indexes are"
            )
        return self._lines[entry]

    def task_numbers(self, entry: int) -> np.ndarray:
        """int32 [tasks of the line's index] -> number in `tasks`; −1 for a task that takes no part."""
        return self._numbers[entry]

    def lengths(self, entry: int) -> EntryLengths:
        """What a window of this line costs, for the sampling plan. Arrays by task count in the line's index."""
        from tiphys.dataio.sampling import EntryLengths

        line, numbers = self._line(entry), self._numbers[entry]
        index, share = line.index, self.prompts[entry]
        units = np.maximum(np.asarray(index.steps, np.int64), 0)
        fixed = np.zeros(len(units), np.int64)
        per_unit, window, prompt_units = (np.ones(len(index.tasks), np.int32) for _ in range(3))
        task_of = np.asarray(index.task)
        for i in line.tasks:
            timestep = self.schemes[entry][int(numbers[i])]
            each, once = timestep.cost(prompts=share > 0)
            mine = task_of == i if len(index.tasks) > 1 else np.ones(len(units), bool)
            if not timestep.acts:
                units[mine] = 1
            fixed[mine] = once + timestep.ends + self._preambles(line, timestep, mine)
            least = int(fixed[mine].min()) if mine.any() else once
            per_unit[i] = max(each, 1)
            window[i] = timestep.window or max(1, (line.objective.context - least) // per_unit[i])
            steps = line.objective.prompt_steps or (self.length // 2) // int(per_unit[i])
            prompt_units[i] = max(1, min(steps, self.length // int(per_unit[i])))
        return EntryLengths(units, window, per_unit, fixed.astype(np.int32), share, prompt_units)

    def _preambles(self, line: _Line, timestep: Timestep, mine: np.ndarray) -> np.ndarray:
        """Ids of the texts that stand once in a window, for the episodes of a mask."""
        total = np.zeros(int(mine.sum()), np.int64)
        for field in timestep.preamble:
            codes, texts = line.index.text(field)
            codes = np.asarray(codes)[mine]
            if (codes < 0).any():
                at = int(np.flatnonzero(mine)[int((codes < 0).argmax())])
                raise DataError(f"{line.index.url}: episode {line.index.id(at)!r} has no text in field {field!r}")
            size = np.zeros(len(texts), np.int64)
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                some = texts[start : start + _TEXTS_AT_ONCE]
                size[start : start + len(some)] = [len(ids) for ids in self.text.encode(some, timestep.text)]
            total += size[codes]
        return total

    def needs(self, entry: int) -> Needs:
        """The fields that this line's tokens show; nothing else is fetched."""
        fields: dict[str, None] = {}
        for timestep in self.schemes[entry].values():
            fields |= dict.fromkeys(timestep.preamble)
            fields |= dict.fromkeys(e.field for e in timestep.elements if e.field)
        return Needs(fields=tuple(fields))

    def make_batch(
        self,
        step: int,
        rows: np.ndarray,
        windows: Sequence[Sequence[Window]],
        *,
        seed: int,
        training: bool = True,
    ) -> dict[str, np.ndarray]:
        """The arrays of the TokenBatch of these rows; a function of (seed, step, rows, windows), however rows are grouped."""
        batch = assemble(
            step,
            rows,
            windows,
            self.schemes,
            self.vocabulary,
            self.text,
            length=self.length,
            seed=seed,
            training=training,
        )
        return batch.to_arrays()

    def processor(self) -> dict[str, Any]:
        """Everything that acting needs, as JSON: see `tiphys.pretrain.acting.processor.Processor`."""
        objectives: dict[str, Any] = {}
        for entry, schemes in enumerate(self.schemes):
            line = self._line(entry)
            mine = objectives.setdefault(
                line.name,
                {
                    "paradigm": line.paradigm.name,
                    "target_return": line.objective.target_return or 1.0,
                    "prompt_steps": line.objective.prompt_steps,
                    "timesteps": {},
                },
            )
            for timestep in schemes.values():
                mine["timesteps"].setdefault(timestep.task, timestep.to_dict())
        return {
            "version": 1,
            "length": self.length,
            "vocabulary": self.vocabulary.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            "best_return": {name: returns.best for name, returns in self._returns.items()},
            "objectives": objectives,
        }


def _line(recipe: Recipe, entry: Entry, index: EpisodeIndex) -> _Line:
    from tiphys.recipes.schema import Objective

    name = entry.objective
    objective = recipe.objectives[name] if name in recipe.objectives else Objective()
    paradigm = PARADIGMS.get(objective.paradigm or name)
    if paradigm is None:
        raise DataError(
            f"objectives.{name}: no paradigm {objective.paradigm or name!r}; there are {', '.join(PARADIGMS)}"
        )
    wanted = list(entry.tasks) or ["*"]
    tasks = tuple(i for i, t in enumerate(index.tasks) if any(fnmatchcase(t.name, pattern) for pattern in wanted))
    if not tasks:
        has = ", ".join(t.name for t in index.tasks)
        raise DataError(f"data.mixture: no task of {entry.dataset} matches {', '.join(wanted)}; it has {has}")
    return _Line(entry, name, objective, paradigm, index, tasks)


def _tasks(lines: Sequence[_Line]) -> tuple[TaskSpec, ...]:
    """Tasks by name in order of appearance; DataError where two datasets mean different things by one name."""
    found: dict[str, tuple[TaskSpec, str]] = {}
    for line in lines:
        for _, task in line:
            known, where = found.setdefault(task.name, (task, line.entry.dataset))
            one, other = ({f.name: f for f in t.fields} for t in (known, task))
            differ = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
            if differ:
                raise DataError(
                    f"task {task.name!r} has other fields in {line.entry.dataset} than in {where}: {', '.join(differ)}; "
                    "rename one of the tasks, or mend the fields"
                )
    return tuple(task for task, _ in found.values())


def _check_names(lines: Sequence[_Line]) -> None:
    """Options that nobody reads and patterns that no field matches are typing errors: DataError."""
    fields: dict[str, set[str]] = {}
    for line in lines:
        fields.setdefault(line.name, set()).update(f.name for _, task in line for f in task.fields)
    for line in lines:
        for option in line.objective.options:
            if option not in OPTIONS:
                raise DataError(f"objectives.{line.name}.options: no option {option!r}; there are {', '.join(OPTIONS)}")
        for pattern in line.objective.fields:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in fields[line.name]):
                has = ", ".join(sorted(fields[line.name]))
                raise DataError(f"objectives.{line.name}.fields: no field matches {pattern!r}; the tasks have {has}")


def _numbers(line: _Line, number: Mapping[str, int]) -> np.ndarray:
    out = np.full(len(line.index.tasks), -1, np.int32)
    for i, task in line:
        out[i] = number[task.name]
    return out


def _tokenizer(recipe: Recipe, lines: Sequence[_Line]) -> str:
    """The text tokenizer that the recipe names, else one learned from every text of its datasets."""
    size = recipe.model.text_vocabulary
    if recipe.model.text_tokenizer:
        return text_tokenizers.load(recipe.model.text_tokenizer, size)
    texts: set[str] = set()
    for line in lines:
        fields = {f.name for _, task in line for f in task.fields if f.modality == "text" and f.per == "episode"}
        for field in sorted(fields):
            texts.update(line.index.text(field)[1])
    return text_tokenizers.learn(texts, size)


def _sizes(schemes: Sequence[Mapping[int, Timestep]]) -> tuple[int, int]:
    """Ids of continuous and of discrete values: Gato's, or what the codecs need beyond them."""
    continuous, discrete = CONTINUOUS_BINS, DISCRETE_VALUES
    for codec in _codecs(schemes):
        if isinstance(codec, Discrete):
            discrete = max(discrete, *codec.values)
        elif isinstance(codec, Bins | Quantiles):
            continuous = max(continuous, codec.choices()[0][1] - codec.first)
    return continuous, discrete


def _codecs(schemes: Sequence[Mapping[int, Timestep]]) -> Iterator[Codec]:
    for timesteps in schemes:
        for timestep in timesteps.values():
            yield from (e.codec for e in timestep.elements if e.codec is not None)


def _heads(schemes: Sequence[Mapping[int, Timestep]]) -> tuple[dict[str, EmbedderSpec], dict[str, int]]:
    """Embedders and regression heads that the timesteps of all tasks ask for."""
    embedders: dict[str, EmbedderSpec] = {}
    for codec in sorted(_codecs(schemes), key=lambda c: c.embedder):
        if codec.embedder:
            spec = codec.embedder_spec()
            embedders[codec.embedder] = embedders.get(codec.embedder, spec).merged(spec, codec.embedder)
    heads = {e.head: e.codec for timesteps in schemes for t in timesteps.values() for e in t.elements if e.head}
    return embedders, {head: codec.embedder_spec().shape[0] for head, codec in heads.items() if codec is not None}


def _statistics(lines: Sequence[_Line]) -> dict[str, dict[str, FieldStatistics]]:
    """task -> field -> statistics over every dataset that has the task."""
    found: dict[str, dict[str, list[FieldStatistics]]] = {}
    seen = set()
    for line in lines:
        for i, task in line:
            mine = found.setdefault(task.name, {})
            if (line.index.fingerprint, i) not in seen:
                for field, statistics in line.index.statistics.get(task.name, {}).items():
                    mine.setdefault(field, []).append(statistics)
            seen.add((line.index.fingerprint, i))
    return {task: {field: pooled(some) for field, some in fields.items()} for task, fields in found.items()}


def _returns(lines: Sequence[_Line], name: str) -> _Returns:
    best, largest = -np.inf, 0.0
    for line in lines:
        for i, task in line:
            if task.name == name:
                returns = np.asarray(line.index.total_return, np.float64)[np.asarray(line.index.task) == i]
                if len(returns):
                    best, largest = max(best, float(returns.max())), max(largest, float(np.abs(returns).max()))
    return _Returns(best if np.isfinite(best) else 0.0, largest)


def _prompt(line: _Line) -> float:
    return line.paradigm.prompt if line.objective.prompt < 0 else line.objective.prompt
