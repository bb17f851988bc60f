"""Branches: many continuations of the rows of a key-value cache. A row's tokens are held once, each branch adds its own.

Attention to the shared tokens and attention to the branch's own are computed apart, and merged by the logarithms of their sums of
exponents, which gives the softmax over both.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tiphys.pretrain.model.key_value_cache import KeyValueCache, weighted
from tiphys.pretrain.model.token_layout import TokenLayout


class Branches:
    """The same number of continuations of each of some rows of a cache, all with the same number of tokens of their own.

    It is given to the model as its `cache`, with a batch that has the same number of new tokens for each branch: first those of
    the first row's branches, then those of the second row's, and so on.

    Parameters
    ----------
    cache : KeyValueCache
        What is shared. It must not change while its branches are used.
    rows : ndarray, int64 [R]
        Rows of the cache.
    each : int
        Branches of each row.
    capacity : int
        Most tokens that a branch adds.
    """

    def __init__(self, cache: KeyValueCache, rows: np.ndarray, each: int, capacity: int) -> None:
        self.cache, self.rows, self.each, self.capacity = cache, rows, each, capacity
        self.length = 0  # tokens that each branch has added
        self._own: dict[int, Tensor] = {}  # layer -> [2, R · each, K, capacity, d]
        lengths = cache.lengths[rows]
        self._end = int(lengths.max())
        self._shared: dict[int, Tensor] = {}  # layer -> [2, R, K, end, d]
        self._unseen = None
        if (lengths != self._end).any():
            self._unseen = torch.from_numpy(np.arange(self._end) >= lengths[:, None])[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Attention of new tokens to themselves, to their branch and to its row: q [T, H, d], k and v [T, K, d] -> [T, H, d].

        The new tokens count as part of the branches after `grow`. Raises ValueError if not each branch has the same number of
        new tokens, or if they are more than `capacity`.
        """
        branches = len(self.rows) * self.each
        windows = layout.windows.numpy()
        new = int(windows[0, 0])
        if len(windows) != branches or (windows[:, 0] != new).any() or self.length + new > self.capacity:
            raise ValueError(f"{branches} branches need the same number of new tokens, up to {self.capacity} in all")
        q, k, v = (t.view(branches, new, *t.shape[1:]) for t in (q, k, v))
        if layer not in self._own:
            self._own[layer] = k.new_zeros(2, branches, k.shape[2], self.capacity, k.shape[3])
            held = self.cache.memory(layer, k[0], self._end)
            self._shared[layer] = held[:, torch.from_numpy(self.rows).to(held.device), :, : self._end]
        stop = self.length + new
        self._own[layer][:, :, :, self.length : stop] = torch.stack([k, v]).transpose(2, 3)
        own = self._own[layer][:, :, :, :stop]
        later = torch.ones(new, stop, dtype=torch.bool, device=q.device).triu(self.length + 1)
        mine, mine_sum = weighted(q, own[0], own[1], later.expand(branches, -1, -1) if new > 1 else None)
        together = q.reshape(len(self.rows), self.each * new, *q.shape[2:])
        unseen = None if self._unseen is None else self._unseen.to(q.device).expand(-1, self.each * new, -1)
        theirs, their_sum = weighted(together, self._shared[layer][0], self._shared[layer][1], unseen)
        theirs, their_sum = theirs.reshape(q.shape), their_sum.reshape(q.shape[:3])
        total = torch.logaddexp(mine_sum, their_sum)
        out = mine * (mine_sum - total).exp()[..., None] + theirs * (their_sum - total).exp()[..., None]
        return out.to(q.dtype).flatten(0, 1)

    def grow(self, new: int) -> None:
        """Count the `new` tokens of the last forward pass as part of the branches."""
        self.length += new

    def select(self, chosen: np.ndarray) -> None:
        """Make branch i a copy of branch chosen[i] of the same row. int64 [R · n]; n may differ from `each` so far."""
        self.each = len(chosen) // len(self.rows)
        for layer, own in self._own.items():
            index = torch.from_numpy(chosen).to(own.device)
            kept = own.new_zeros(2, len(chosen), *own.shape[2:])
            kept[:, :, :, : self.length] = own[:, :, :, : self.length].index_select(1, index)
            self._own[layer] = kept

    @property
    def bytes(self) -> int:
        """Memory that the branches' own tokens take."""
        return sum(own.numel() * own.element_size() for own in self._own.values())
