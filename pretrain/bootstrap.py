"""Transitions that a policy draws and is confident of, as a dataset to train on (Wang et al. 2022: bootstrapped transformer).

From each episode some windows are chosen. The policy draws the last observation and action of each anew, several times. Those
that it holds for most probable become clips (`tokens.clips`), which a run can add to its mixture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Episode, TaskSpec, Window
from tiphys.dataio.format.rows import returns_to_go
from tiphys.dataio.format.table import hash_id
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.messages import counted
from tiphys.dataio.philox import BOOTSTRAP, uniform32, words
from tiphys.dataio.shards import ShardWriter
from tiphys.dataio.stored import number as within
from tiphys.pretrain.acting.beam import drawn
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.recall import Recall
from tiphys.pretrain.made_data import AT_ONCE, longest_window, opened
from tiphys.pretrain.tokens.clips import SPEC, Clip, are_clips
from tiphys.pretrain.tokens.derived import derived
from tiphys.pretrain.tokens.timestep import CAUSAL, TimestepLayout

AGENT = "bootstrap"
_DRAWN = ("observation", "action")  # the kinds of parts that are drawn; the others are those of the data
_LONGEST_ID = 400  # bytes of a parent's id that a clip's id can begin with


@dataclass(frozen=True)
class Drawing:
    """How transitions are drawn.

    keep        share of the drawn ones that are kept, those with the highest confidence
    draws       how often the last transition of a window is drawn
    windows     windows of each episode
    validation  share of the episodes that is held out; none of them is used
    seed        of the windows and draws
    """

    keep: float = 0.1
    draws: int = 4
    windows: int = 1
    validation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        within(self.keep, "keep", 0, 1)
        within(self.draws, "draws", 1, 1 << 16)
        within(self.windows, "windows", 1, 1 << 16)
        within(self.validation, "validation", 0, 1)


@dataclass(frozen=True)
class Bootstrapped:
    """What was drawn.

    drawn       transitions that were drawn
    kept        those that were written
    confidence  of the kept ones, lowest and highest: mean log probability of a token
    held_out    episodes that were left alone because they are held out
    short       episodes that were left alone because they have one step
    """

    drawn: int
    kept: int
    confidence: tuple[float, float]
    held_out: int
    short: int

    def __str__(self) -> str:
        low, high = self.confidence
        text = (
            f"kept {self.kept} of {self.drawn} drawn transitions; mean log probability {low:.3f} to {high:.3f} a token"
        )
        text += f"; {self.held_out} held-out episodes were not used" if self.held_out else ""
        return text + (f"; {counted(self.short, 'episode has', 'episodes have')} one step" if self.short else "")


@dataclass(frozen=True)
class _Chosen:
    """The windows of one episode: number of the episode, and the step that is drawn anew in each."""

    episode: int
    last: int


def bootstrap(
    policy: str | Path | Policy,
    dataset: str,
    out: str,
    how: Drawing,
    *,
    device: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Bootstrapped:
    """Write a dataset of clips of a dataset's episodes, whose last observations and actions a policy has drawn.

    Rewards and values stay those of the data. So they do not count in the confidence, which is the mean log probability of the
    tokens that were drawn.

    Parameters
    ----------
    policy : str, Path or Policy
        Folder of a policy with an objective that predicts observations and actions as ids (`boot`, `tt`).
    dataset : str
        URL of the dataset, whose tasks the policy was trained on.
    out : str
        URL of the new dataset.
    how : Drawing
        How many are drawn and kept.
    device : str
        A torch device; "": a GPU if there is one.
    progress : callable, optional
        Called with the number of windows that are done, and of all.

    Raises
    ------
    DataError
        If the policy cannot draw transitions of a task, the dataset has no episode of two steps that is not held out, or its
        episodes are clips themselves.
    """
    policy, index, layouts = opened(policy, dataset, device, drawing_layout)
    held = np.asarray(index.held_out(how.validation))
    short = np.asarray(index.steps) < 2
    usable = np.flatnonzero(~held & ~short)
    if not len(usable):
        raise DataError(
            f"{dataset}: it has no episode of at least two steps that is not held out, so there is nothing to draw"
        )
    chosen = list(_windows(index, usable, how))
    confidence, values = np.zeros((len(chosen), how.draws)), []
    for begin, some in _batches(index, chosen):
        windows = [_window(layouts[e.task], e, _first(policy, layouts[e.task], e, c.last), c.last + 1) for e, c in some]
        numbers = np.arange(begin, begin + len(some))
        found, sure = draw(policy, layouts[some[0][0].task], windows, numbers, how)
        confidence[numbers] = sure
        values += found
        if progress is not None:
            progress(begin + len(some), len(chosen))
    kept = np.sort(best(confidence.reshape(-1), how.keep))
    tasks = [replace(task, fields=(*task.fields, SPEC)) for task in index.tasks]
    with ShardWriter(out, tasks) as writer:
        for place in kept.tolist():
            number, times = divmod(place, how.draws)
            episode = read_episode(index, chosen[number].episode)
            layout = layouts[episode.task]
            info = {"draw": times, "confidence": float(confidence[number, times])}
            last = chosen[number].last
            made = {name: one[times] for name, one in values[number].items()}
            first = _first(policy, layout, episode, last)
            writer.write(_clip(layout, writer.tasks[episode.task], episode, first, last, made, info))
    sure = confidence.reshape(-1)[kept]
    return Bootstrapped(
        confidence.size,
        len(kept),
        (float(sure.min()), float(sure.max())),
        int(held.sum()),
        int((short & ~held).sum()),
    )


def best(confidence: np.ndarray, share: float) -> np.ndarray:
    """Indices of the share of the values [n] that are highest; at least one."""
    count = max(1, int(share * len(confidence)))
    return np.argsort(-confidence, kind="stable")[:count]


def drawing_layout(policy: Policy, task: TaskSpec) -> TimestepLayout:
    """The layout by which a policy draws transitions of a task. Raises DataError if it cannot."""
    if are_clips(task):
        raise DataError(
            f"task {task.name!r}: its episodes are clips that a policy has drawn; draw from the dataset that they were cut from"
        )
    found = [by_task[task.name] for by_task in policy.processor.layouts.values() if task.name in by_task]
    for layout in found:
        if _can_draw(layout):
            if missing := [name for name in layout.fields if name not in {f.name for f in task.fields}]:
                raise DataError(
                    f"task {task.name!r}: the dataset has no field {', '.join(missing)}, which the policy sees"
                )
            if layout.steps(0, policy.processor.length) < 2:
                raise DataError(
                    f"task {task.name!r}: the policy's windows have one step, so nothing comes before the one that is drawn; "
                    "train with a larger `context` or `window`"
                )
            return layout.acting()
    raise DataError(
        f"task {task.name!r}: the policy {'cannot draw its steps' if found else 'was not trained on it'}; train an objective "
        "that predicts observations and actions as ids, and a discounted return, such as `boot`"
    )


def _can_draw(layout: TimestepLayout) -> bool:
    drawn = [e for e in layout.elements if e.role in _DRAWN]
    return (
        layout.mask == CAUSAL
        and not layout.varies
        and {e.role for e in drawn} == set(_DRAWN)
        and all(e.predicted and not e.head and not e.frame and not e.available and not e.constant for e in drawn)
        and [e.rule.partition(":")[0] for e in layout.elements if e.rule] == ["discounted"]
        and not layout.prompt_steps
    )


def _windows(index: EpisodeIndex, usable: np.ndarray, how: Drawing) -> Iterator[_Chosen]:
    """The windows, one after another, of one task after another. A window ends at any step but the first."""
    task = np.asarray(index.task)
    for number in sorted(usable.tolist(), key=lambda n: (int(task[n]), n)):
        chance = uniform32(words(how.seed, number, np.arange(how.windows), 0xFFFF, purpose=BOOTSTRAP)[0])
        last = 1 + (chance * (int(index.steps[number]) - 1)).astype(int)
        yield from (_Chosen(number, one) for one in np.unique(last).tolist())


def _batches(index: EpisodeIndex, chosen: list[_Chosen]) -> Iterator[tuple[int, list[tuple[Episode, _Chosen]]]]:
    """(number of the first window, windows with their episodes) of one task each."""
    begin, left = 0, iter(chosen)
    known: tuple[int, Episode] | None = None
    while some := list(islice(left, AT_ONCE)):
        pairs = []
        for one in some:
            if known is None or known[0] != one.episode:
                known = one.episode, read_episode(index, one.episode)
            pairs.append((known[1], one))
        for task in dict.fromkeys(episode.task for episode, _ in pairs):
            mine = [pair for pair in pairs if pair[0].task == task]
            yield begin, mine
            begin += len(mine)


@torch.inference_mode()
def draw(
    policy: Policy, layout: TimestepLayout, windows: list[Window], numbers: np.ndarray, how: Drawing
) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """The last step of each window, drawn `how.draws` times.

    Returns
    -------
    values : list of dict
        For each window, field -> values [draws, *shape], in the units of the dataset.
    confidence : float64 [windows, draws]
        Mean log probability of the tokens that were drawn.
    """
    n = len(windows) * how.draws
    batch = policy.processor.encode(layout, [[w] for w in windows for _ in range(how.draws)])
    rows = np.arange(n)
    first = (batch.segment > 0).sum(axis=1) - layout.width  # of the last step
    recall, read = Recall(policy.model, n, batch.length), np.zeros(n, np.int64)
    window, times = np.repeat(numbers, how.draws), np.tile(np.arange(how.draws), len(windows))
    ids: dict[str, list[np.ndarray]] = {}
    sure, count = np.zeros(n), 0
    for element, column in zip(layout.elements, layout.columns, strict=True):
        if element.role not in _DRAWN:
            continue
        assert element.codec is not None
        for place, (low, high) in enumerate(element.codec.choices(), start=column):
            logits = policy.model.logits(recall.read(batch.part(rows, read, first + place), rows))[:, low:high]
            read = first + place
            chance = uniform32(words(how.seed, window, times, 0, place, purpose=BOOTSTRAP)[0])
            taken = drawn(logits.cpu(), chance)
            sure += logits.double().log_softmax(-1).cpu().numpy()[rows, taken]
            batch.tokens[rows, read] = taken + low
            ids.setdefault(element.field, []).append(taken + low)
            count += 1
    codecs = {e.field: e.codec for e in layout.elements if e.role in _DRAWN}
    values = {name: codecs[name].decode(np.stack(some, axis=1)) for name, some in ids.items()}  # type: ignore[union-attr]
    each = [slice(i * how.draws, (i + 1) * how.draws) for i in range(len(windows))]
    return [{name: v[part] for name, v in values.items()} for part in each], (sure / count).reshape(-1, how.draws)


def _first(policy: Policy, layout: TimestepLayout, episode: Episode, last: int) -> int:
    """The first step of the longest window that ends with a step."""
    return max(0, last + 1 - longest_window(policy, layout, episode))


def _window(layout: TimestepLayout, episode: Episode, first: int, stop: int) -> Window:
    """The steps [first, stop) of an episode, with all rows after them that have an action."""
    once = set(layout.preamble)
    rows = slice(first, episode.steps)
    fields = {name: episode.fields[name] if name in once else episode.fields[name][rows] for name in layout.fields}
    return Window(
        entry=0,
        task=0,
        episode=episode.id,
        start=first,
        steps=stop - first,
        episode_steps=episode.steps,
        fields=fields,
        step=np.arange(first, episode.steps),
        returns_to_go=returns_to_go(episode, episode.steps)[rows].astype(np.float32),
        valid=np.ones(episode.steps - first, bool),
    )


def _clip(
    layout: TimestepLayout,
    task: TaskSpec,
    episode: Episode,
    first: int,
    last: int,
    made: dict[str, np.ndarray],
    info: dict[str, Any],
) -> Episode:
    """The steps [first, last] of an episode, of which the last one has the values that were made."""
    rule = next(e.rule for e in layout.elements if e.rule)
    window = _window(layout, episode, first, last + 1)
    after = float(derived(window, last + 1 - first, rule, {})[-1])
    once = {f.name for f in task.fields if f.per == "episode"}
    fields = {n: v if n in once else np.array(v[first : last + 1]) for n, v in episode.fields.items()}
    for name, value in made.items():
        fields[name][-1] = value
    fields[SPEC.name] = np.array(Clip(first, episode.steps, after, float(rule.partition(":")[2])))
    return Episode(
        id=_id(episode.id, last, int(info["draw"])),
        task=episode.task,
        fields=fields,
        steps=last + 1 - first,
        agent=AGENT,
        info={"parent": episode.id, "step": last, **info},
    )


def _id(parent: str, last: int, times: int) -> str:
    """An id that is held out by no share of up to a half that spares the parent."""
    stem = parent if len(parent.encode()) <= _LONGEST_ID else hashlib.blake2b(parent.encode()).hexdigest()
    least, number = min(hash_id(parent), 1 << 63), 0
    while hash_id(name := f"{stem}/{last}.{times}.{number}") < least:
        number += 1
    return name
