"""How many tokens the windows of a mixture entry take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.mixture_entries import MixtureEntry
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import TimestepLayout

if TYPE_CHECKING:
    from tiphys.dataio.plan.cost import Savings
    from tiphys.dataio.sampling import EntryLengths

_TEXTS_AT_ONCE = 1 << 10
_NO_LIMIT = 1 << 30  # steps of a window that only the context bounds


def entry_lengths(
    line: MixtureEntry,
    numbers: np.ndarray,
    layouts: Mapping[int, TimestepLayout],
    share: float,
    length: int,
    text: TextTokenizer,
    savings: Savings | None,
) -> EntryLengths:
    """How many tokens the windows of a mixture entry take: see `Objectives.lengths`.

    Parameters
    ----------
    line : MixtureEntry
        The entry.
    numbers : int32 [tasks of its dataset]
        Their numbers in the run.
    layouts : mapping of int to TimestepLayout
        By number of the task.
    share : float
        Share of rows, or of windows, that have a prompt.
    length : int
        Positions of a row.
    text : TextTokenizer
        The text tokenizer of the run.
    savings : Savings, optional
        What its steps take less than planned.
    """
    from tiphys.dataio.plan.cost import StepCost
    from tiphys.dataio.sampling import EntryLengths

    index, number = line.index, len(line.index.tasks)
    units, task_of = np.maximum(np.asarray(index.steps, np.int64), 0), np.asarray(index.task)
    fixed, costs = np.zeros(len(units), np.int64), [StepCost.plain(1)] * number
    window, prompt_units = np.ones(number, np.int32), np.ones(number, np.int32)
    prompt, every = np.zeros((2, number), np.float32)
    for i in line.tasks:
        layout = layouts[int(numbers[i])]
        mine = task_of == i if number > 1 else np.ones(len(units), bool)
        if layout.width:
            costs[i] = StepCost(layout.cadence, layout.chunk)
        window[i] = layout.window or _NO_LIMIT
        texts = _preambles(line, layout, mine, text)
        fixed[mine] = layout.extra + layout.copies * texts
        if layout.document:
            units[mine], fixed[mine] = texts, 1
            window[i] = max(layout.text_limit - 1, 1) if layout.text_limit else _NO_LIMIT
        elif layout.text_last:
            units[mine] = 1
        elif not layout.has_actions:
            units[mine] = np.maximum(units[mine], 1)
        else:  # a prompt is a demonstration
            (every if layout.prompt_steps else prompt)[i] = share
            most = line.objective.prompt_steps or line.paradigm.prompt.steps or layout.fit(length // 2)
            prompt_units[i] = layout.prompt_steps or max(1, most)
    return EntryLengths(
        units=units,
        window=window,
        context=np.full(number, line.objective.context, np.int32),
        costs=costs,
        fixed=fixed.astype(np.int32),
        prompt=prompt,
        prompt_units=prompt_units,
        savings=savings,
        every=every if every.any() else None,
        ends=np.full(number, line.paradigm.prompt.ends, np.float32) if every.any() or prompt.any() else None,
    )


def _preambles(line: MixtureEntry, timestep: TimestepLayout, mine: np.ndarray, text: TextTokenizer) -> np.ndarray:
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
            size[start : start + len(some)] = text.count(some, limit)
        total += size[codes]
    return total
