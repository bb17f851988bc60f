"""Datasets that a policy makes of others: what `label` and `bootstrap` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tiphys.dataio.episode import Episode, TaskSpec
from tiphys.dataio.index import EpisodeIndex
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.tokens.timestep import TimestepLayout

AT_ONCE = 32  # windows of a forward pass


def opened(
    policy: str | Path | Policy,
    dataset: str,
    device: str,
    layout_of: Callable[[Policy, TaskSpec], TimestepLayout],
) -> tuple[Policy, EpisodeIndex, dict[str, TimestepLayout]]:
    """The policy, the dataset, and for each of its tasks the layout that `layout_of` chooses or refuses by a DataError."""
    policy = policy if isinstance(policy, Policy) else Policy.load(policy, device)
    index = EpisodeIndex.open(dataset)
    return policy, index, {task.name: layout_of(policy, task) for task in index.tasks}


def longest_window(policy: Policy, layout: TimestepLayout, episode: Episode, extra: int = 0) -> int:
    """Most steps of an episode that fit a window of the policy, beside the episode's texts and `extra` further tokens."""
    texts = [str(episode.fields[name]) for name in layout.preamble]
    head = sum(len(ids) for ids in policy.processor.text.encode(texts, layout.text_limit))
    return layout.steps(head + extra, policy.processor.length)
