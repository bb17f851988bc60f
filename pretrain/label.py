"""Labels data without actions by a policy that infers them from what comes before and after (Baker et al. 2022, sec. 4.1).

An episode is labelled in windows that overlap by half. Of each window only the middle is kept, where the model sees as much
before as after; at the ends of the episode all that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Episode, TaskSpec, Window
from tiphys.dataio.messages import counted
from tiphys.dataio.shards import ShardWriter
from tiphys.pretrain.acting.infer import fill_in
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.slots import any_value
from tiphys.pretrain.made_data import AT_ONCE, longest_window, opened
from tiphys.pretrain.tokens.timestep import BOTH, TimestepLayout


@dataclass
class Labels:
    """What was labelled.

    steps       steps of the dataset, as it says
    labelled    those of them that have an action now
    confidence  mean probability of the labels
    episodes    episodes that were written
    dropped     episodes of one row, in which nothing lies between two observations
    """

    steps: int = 0
    labelled: int = 0
    confidence: float = 0.0
    episodes: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        share = self.labelled / max(self.steps, 1)
        text = (
            f"{self.labelled} of {counted(self.steps, 'step')} in {counted(self.episodes, 'episode')} "
            f"are labelled ({share:.1%}); mean probability of "
            f"a label: {self.confidence / max(self.labelled, 1):.3f}"
        )
        return text + (f"; {counted(self.dropped, 'episode is', 'episodes are')} too short" if self.dropped else "")


def label(
    policy: str | Path | Policy,
    dataset: str,
    out: str,
    *,
    device: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Labels:
    """Write a dataset with the episodes of another and the actions that a policy infers.

    All episodes and steps are kept, however sure the policy is: if only confident labels were kept, a policy that learns from
    them would be biased towards what is easy to label. The last observation of an episode stays without an action.

    Parameters
    ----------
    policy : str, Path or Policy
        Folder of a policy with an objective that labels, such as `idm`.
    dataset : str
        URL of the dataset. Its tasks have the names, observations and texts that the policy was trained on. Actions that it has
        are replaced.
    out : str
        URL of the new dataset.
    device : str
        A torch device; "": a GPU if there is one.
    progress : callable, optional
        Called with the number of episodes that are done, and of all.

    Raises
    ------
    DataError
        If the policy cannot label a task of the dataset, or if a field of an observation is missing or differs.
    """
    policy, index, layouts = opened(policy, dataset, device, labelling)
    tasks = {
        task.name: _labelled_task(task, policy.processor.tasks[task.name], layouts[task.name]) for task in index.tasks
    }
    found = Labels()
    with ShardWriter(out, list(tasks.values())) as writer:
        for number in range(index.episodes):
            episode = read_episode(index, number)
            made = _labelled(policy, layouts[episode.task], tasks[episode.task], episode, found)
            if made is not None:
                writer.write(made)
            if progress is not None:
                progress(number + 1, index.episodes)
    return found


def labelling(policy: Policy, task: TaskSpec) -> TimestepLayout:
    """The layout by which a policy labels a task. Raises DataError if it cannot."""
    known = policy.processor.layouts
    for name, layouts in known.items():
        if policy.processor.rule(name)[0] == "label" and task.name in layouts:
            layout = layouts[task.name]
            break
    else:
        able = sorted({t for n, by in known.items() if policy.processor.rule(n)[0] == "label" for t in by})
        raise DataError(
            f"task {task.name!r}: the policy has not learned to label it; it labels {', '.join(able) or 'nothing'}. Train an "
            "objective with paradigm `idm` on episodes of this task that have actions"
        )
    assert layout.mask == BOTH
    mine, theirs = ({f.name: f for f in t.fields} for t in (task, policy.processor.tasks[task.name]))
    for name in layout.fields:
        if theirs[name].role in ("action", "reward"):
            continue
        if name not in mine:
            raise DataError(f"task {task.name!r}: the dataset has no field {name!r}, which the policy sees")
        if (mine[name].shape, mine[name].modality) != (theirs[name].shape, theirs[name].modality):
            raise DataError(
                f"task {task.name!r}, field {name!r}: the dataset has {mine[name].modality} values of shape {mine[name].shape}, "
                f"the policy sees {theirs[name].modality} values of shape {theirs[name].shape}"
            )
    return layout


def _labelled_task(task: TaskSpec, learnt: TaskSpec, layout: TimestepLayout) -> TaskSpec:
    """The task with the action fields that the policy answers, instead of its own."""
    answered = [e.field for e in layout.elements if e.role == "action"]
    kept = [f for f in task.fields if f.role != "action"]
    return replace(task, fields=(*kept, *(learnt.field(name) for name in answered)))


def _labelled(
    policy: Policy, layout: TimestepLayout, task: TaskSpec, episode: Episode, found: Labels
) -> Episode | None:
    """The episode with actions; None if it has no two observations."""
    observed = [e.field for e in layout.elements if e.role == "observation" and not e.constant]
    rows = min(len(episode.fields[name]) for name in observed)
    steps = min(episode.steps, rows - 1)
    found.steps += max(episode.steps, 1)
    if steps < 1:
        found.dropped += 1
        return None
    actions: dict[str, list[np.ndarray]] = {}
    windows, kept = zip(*_windows(policy, layout, episode, steps), strict=True)
    for begin in range(0, len(windows), AT_ONCE):
        some = list(windows[begin : begin + AT_ONCE])
        filled = fill_in(policy.model, policy.processor, layout, some)
        for window, (low, high), fields in zip(some, kept[begin : begin + AT_ONCE], filled, strict=True):
            for number, (name, one) in enumerate(fields.items()):
                mine = (one.steps + window.start >= low) & (one.steps + window.start < high)
                actions.setdefault(name, []).append(one.values[mine])
                found.confidence += float(one.confidence[mine].sum()) / len(fields)
                assert number or mine.sum() == high - low
    found.labelled += steps
    found.episodes += 1
    names = {f.name: f for f in task.fields}
    fields = {
        name: value if names[name].per == "episode" else value[: steps + (names[name].role in ("observation", "text"))]
        for name, value in episode.fields.items()
        if name in names and names[name].role != "action"
    }
    return replace(episode, fields=fields | {k: np.concatenate(v) for k, v in actions.items()}, steps=steps)


def _windows(
    policy: Policy, layout: TimestepLayout, episode: Episode, steps: int
) -> Iterator[tuple[Window, tuple[int, int]]]:
    """Windows that cover the steps of an episode, each with the steps [low, high) whose labels are kept."""
    length = min(longest_window(policy, layout, episode, layout.extra), steps)
    stride = max(1, length // 2)
    starts = [*range(0, steps - length, stride), steps - length]
    bounds = [0, *((a + length + b) // 2 for a, b in pairwise(starts)), steps]
    placeholders = {e.field: any_value(e) for e in layout.elements if e.role in ("action", "reward")}
    constant = {e.field for e in layout.elements if e.constant} | set(layout.preamble)
    for start, low, high in zip(starts, bounds, bounds[1:]):
        stop = min(start + length + layout.future, steps + 1)
        fields = {}
        for name in layout.fields:
            if name in placeholders:
                fields[name] = np.repeat(placeholders[name][None], stop - start, axis=0)
            else:
                fields[name] = episode.fields[name] if name in constant else episode.fields[name][start:stop]
        yield (
            Window(
                entry=0,
                task=0,
                episode=episode.id,
                start=start,
                steps=length,
                episode_steps=episode.steps,
                fields=fields,
                step=np.arange(start, stop),
                returns_to_go=np.zeros(stop - start, np.float32),
                valid=np.arange(start, stop) < steps,
            ),
            (low, high),
        )
