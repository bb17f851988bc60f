"""Recall: what a model remembers of the histories of a batch of environments, so that each step computes its new tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiphys.pretrain.acting.history import Acting
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
        self._heads: dict[Any, dict[int, torch.Tensor]] = {}

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
        start = acting.start.copy()
        for level in range(max(map(len, acting.heads), default=0)):
            members: dict[Any, list[int]] = {}
            for row, heads in enumerate(acting.heads):
                before = heads[level - 1][0] if level else 0
                if len(heads) > level and self.cache.lengths[rows[row]] == before:
                    members.setdefault(heads[level], []).append(row)
            for (length, key), sharing in members.items():
                there = np.array(sharing)
                new = length - int(start[there[0]])
                if key not in self._heads and (len(there) - 1) * new >= _WORTH:
                    one = there[:1]
                    self.read(acting.batch.part(one, start[one], length), rows[one])
                    self._keep(key, int(rows[one[0]]), length - new, length)
                if key in self._heads:
                    self._heads[key] = self._heads.pop(key)  # the last that was used
                    self.cache.paste(rows[there], self._heads[key], length - new)
                    start[there] = length
        return start

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
            for length, key in heads:
                if key not in self._heads:
                    self._keep(key, row, before, length)
                before = length

    def _keep(self, key: Any, row: int, start: int, stop: int) -> None:
        if len(self._heads) >= _KEPT:
            del self._heads[next(iter(self._heads))]
        self._heads[key] = self.cache.copy_row(row, start, stop)
