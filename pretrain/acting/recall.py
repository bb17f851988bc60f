"""Recall: what a model remembers of the histories of a batch of environments, so that each step computes its new tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tiphys.pretrain.acting.history import Acting, Head
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.key_value_cache import KeyValueCache
from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel

_KEPT = 64  # beginnings of windows that are kept
_WORTH = 64  # tokens that a forward pass of its own has to save


class Recall:
    """The key-value cache of a batch of environments, one row for each, and the beginnings that their windows share.

    A demonstration and an instruction stand at the beginning of a window. They are computed once, and are copied into every
    window that begins with them, of any environment and any episode.

    Parameters
    ----------
    model : DecisionModel
        The model that reads the tokens.
    environments : int
        Number of environments.
    capacity : int
        Most tokens of a window.

    Attributes
    ----------
    tokens : int
        Number of tokens that have been through the model.
    """

    def __init__(self, model: DecisionModel, environments: int, capacity: int) -> None:
        self.model, self.tokens = model, 0
        self.cache = KeyValueCache(environments, capacity)
        self._kept: dict[Head, dict[int, torch.Tensor]] = {}

    def begin(self, acting: Acting, rows: np.ndarray) -> np.ndarray:
        """Forget what is not in the windows any more, and recall their beginnings.

        Parameters
        ----------
        acting : Acting
            The histories of some environments.
        rows : ndarray, int64 [R]
            The numbers of these environments.

        Returns
        -------
        ndarray, int64 [R]
            The column of each row's first token that still has to be read.
        """
        self.cache.lengths[rows] = acting.past
        start, all_heads = acting.start.copy(), [self._heads_of(heads) for heads in acting.heads]
        for level in range(max(map(len, all_heads), default=0)):
            members: dict[Head, list[int]] = {}
            for row, heads in enumerate(all_heads):
                known = self.cache.lengths[rows[row]]
                if len(heads) > level and known == (heads[level - 1].tokens if level else 0):
                    members.setdefault(heads[level], []).append(row)
            for head, sharing in members.items():
                there = np.array(sharing)
                new = head.tokens - int(start[there[0]])
                if head not in self._kept and (len(there) - 1) * new >= _WORTH:
                    one = there[:1]
                    self.read(acting.batch.part(one, start[one], head.tokens), rows[one])
                    self._keep(head, int(rows[one[0]]), head.tokens - new)
                if head in self._kept:
                    self._kept[head] = self._kept.pop(head)  # the last that was used
                    self.cache.paste(rows[there], self._kept[head], head.tokens - new)
                    start[there] = head.tokens
        return start

    def _heads_of(self, heads: tuple[Head, ...]) -> tuple[Head, ...]:
        """The same, without the step's number if the model does not see it."""
        return heads if self.model.config.timesteps else tuple(head._replace(number=0) for head in heads)

    def read(self, batch: TokenBatch, rows: np.ndarray) -> torch.Tensor:
        """The hidden states [R, D] of the last tokens of a batch, whose rows go on where these rows of the cache end."""
        new = (batch.segment > 0).sum(axis=1)
        inputs = to_tensors(batch, self.model.device)
        hidden = self.model(inputs, cache=self.cache.extend(new, rows)).hidden
        self.tokens += int(new.sum())
        order = np.argsort(new, kind="stable")  # the model's compact order
        last = np.empty_like(new)
        last[order] = np.cumsum(new[order]) - 1
        return hidden[torch.from_numpy(last).to(hidden.device)]

    def end(self, acting: Acting, rows: np.ndarray) -> None:
        """Keep the beginnings of windows that were read for the first time."""
        for row, heads in zip(rows.tolist(), acting.heads, strict=True):
            before = 0
            for head in self._heads_of(heads):
                if head not in self._kept:
                    self._keep(head, row, before)
                before = head.tokens

    def _keep(self, head: Head, row: int, start: int) -> None:
        if len(self._kept) >= _KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[head] = self.cache.copy_row(row, start, head.tokens)

    @property
    def bytes(self) -> int:
        """Memory that the keys and values take."""
        kept = (part for layers in self._kept.values() for part in layers.values())
        return self.cache.bytes + sum(part.numel() * part.element_size() for part in kept)
