"""KeyValueCache: the keys and values of tokens that have been through the model, so that acting computes only new tokens.

Keys stay valid while the tokens before them stay in view: if the oldest tokens of a window are dropped, the others must be
computed again, because their hidden states were made in view of the dropped ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tiphys.pretrain.model.attention import attend
from tiphys.pretrain.model.inputs import to_device
from tiphys.pretrain.model.token_layout import TokenLayout, length_class

FEW = 16  # windows of at most this many new tokens are computed together, whatever their lengths
_LEAST = 64  # tokens of a row for which memory is taken at first


class KeyValueCache:
    """Keys and values of the tokens that each row of a batch of sequences has so far. Each row is one causal window.

    All rows share one array for each layer, and each row has its own length. Memory grows by doubling up to `capacity`.

    Parameters
    ----------
    rows : int
        Number of rows.
    capacity : int
        Most tokens of a row.

    Attributes
    ----------
    lengths : ndarray, int64 [rows]
        Number of tokens that each row has. A smaller number forgets the tokens from there on.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = np.zeros(rows, np.int64)
        self._layers: dict[int, Tensor] = {}  # layer -> [2, rows, K, room, d]: keys and values

    def extend(self, new: np.ndarray, rows: np.ndarray | None = None) -> Extension:
        """What the model needs as its `cache` to read a batch of new tokens. `lengths` grow at once.

        Parameters
        ----------
        new : ndarray, int [n]
            Number of new tokens in each row of the batch. Their positions continue those that the cache has.
        rows : ndarray, int [n], optional
            The cache's row of each row of the batch, no row twice. None: 0, 1, …

        Raises
        ------
        ValueError
            If a row would have more than `capacity` tokens.
        """
        rows = np.arange(len(new)) if rows is None else np.asarray(rows)
        order = np.argsort(
            new, kind="stable"
        )  # the model's compact order: by number of tokens, then by row of the batch
        order = order[new[order] > 0]
        rows, new = rows[order], np.asarray(new, np.int64)[order]
        past = self.lengths[rows]
        if len(rows) and int((past + new).max()) > self.capacity:
            raise ValueError(f"a row would have {int((past + new).max())} tokens, but the cache holds {self.capacity}")
        self.lengths[rows] = past + new
        return Extension(self, rows, past, new)

    def memory(self, layer: int, like: Tensor, tokens: int) -> Tensor:
        """[2, rows, K, room, d]: the keys and values of a layer, with room for `tokens` tokens. `like`: keys [T, K, d]."""
        held = self._layers.get(layer)
        if held is None or held.shape[3] < tokens:
            room = min(self.capacity, max(_LEAST, 1 << (int(tokens) - 1).bit_length()))
            # zeros, because values behind a row's end are multiplied by a weight of zero
            grown = like.new_zeros(2, len(self.lengths), like.shape[1], room, like.shape[2])
            if held is not None:
                grown[:, :, :, : held.shape[3]] = held
            self._layers[layer] = held = grown
        return held

    def copy_row(self, row: int, start: int, stop: int) -> dict[int, Tensor]:
        """The tokens [start, stop) of a row: layer -> [2, K, stop − start, d]."""
        return {layer: held[:, row, :, start:stop].clone() for layer, held in self._layers.items()}

    def paste(self, rows: np.ndarray, tokens: dict[int, Tensor], start: int) -> None:
        """Make the tokens of `copy_row` the last of these rows, from position `start` on."""
        stop = start
        for layer, part in tokens.items():
            stop = start + part.shape[2]
            held = self.memory(layer, part[0].transpose(0, 1), stop)
            held[:, torch.from_numpy(rows).to(held.device), :, start:stop] = part[:, None]
        self.lengths[rows] = stop

    @property
    def bytes(self) -> int:
        """Memory that the cache has taken."""
        return sum(held.numel() * held.element_size() for held in self._layers.values())


@dataclass
class _Part:
    """Windows that are computed together: n windows, each padded to `width` new tokens.

    slots    int64 [n · width]: the token in each slot; padding repeats the window's last token. None: all tokens, in order
    places   int64 [tokens]: the slot of each real token. None if nothing is padded
    tokens   int64 [tokens]: the real tokens of these windows, in compact order
    rows     [n]: the cache's rows, ascending
    past     [n]: tokens that the cache had of each row
    end      most tokens of a row, with the new ones
    """

    slots: np.ndarray | None
    places: np.ndarray | None
    tokens: np.ndarray
    rows: np.ndarray
    past: np.ndarray
    width: int
    end: int


class Extension:
    """New tokens of some rows of a `KeyValueCache`, for one forward pass. Windows are in the model's compact order.

    rows, past, new   [W]: the cache's row of each window, the tokens that it had, and its new tokens
    """

    def __init__(self, cache: KeyValueCache, rows: np.ndarray, past: np.ndarray, new: np.ndarray) -> None:
        self.cache, self.rows, self.past, self.new = cache, rows, past, new
        self.first = np.cumsum(new) - new
        self._parts = list(self._split())
        self._known: dict[tuple[str, int, torch.device], Tensor | None] = {}

    def _split(self) -> Iterator[_Part]:
        kind = np.where(self.new <= FEW, 0, length_class(self.new) * 2 + (self.past > 0))
        for one in np.unique(kind):
            chosen = np.flatnonzero(kind == one)
            chosen = chosen[np.argsort(self.rows[chosen])]
            sizes, first, width = self.new[chosen], self.first[chosen], int(self.new[chosen].max())
            slots: np.ndarray | None = (first[:, None] + np.minimum(np.arange(width), sizes[:, None] - 1)).reshape(-1)
            owner = np.repeat(np.arange(len(chosen)), sizes)
            tokens = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner] + first[owner]
            places: np.ndarray | None = (
                np.arange(len(owner)) + (np.arange(len(chosen)) * width - np.cumsum(sizes) + sizes)[owner]
            )
            if (sizes == width).all():
                places = None
                if (np.diff(first) == width).all() and len(chosen) == len(self.new):
                    slots = None
            past = self.past[chosen]
            yield _Part(slots, places, tokens, self.rows[chosen], past, width, int((past + sizes).max()))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Attention of new tokens to themselves and to all earlier tokens of their row, which the cache then has too.

        q [T, H, d], k and v [T, K, d] -> [T, H, d]. Raises ValueError if the batch's windows are not those of the cache.
        """
        windows = layout.windows.numpy()
        causal = bool(windows[:, 1].all()) and not windows[:, 2].any()
        if len(windows) != len(self.new) or (windows[:, 0] != self.new).any() or not causal:
            raise ValueError(
                "a key-value cache needs causal rows of one window each, without a prefix, with the lengths that `extend` got"
            )
        held = self.cache.memory(layer, k, int((self.past + self.new).max(initial=0)))
        row, column = self._tensor("row", 0, k.device), self._tensor("column", 0, k.device)
        held[:, row, :, column] = torch.stack([k, v], 1)
        if len(self._parts) == 1 and self._parts[0].slots is None:
            return self._part(0, held, q, k, v).reshape(q.shape)
        out = torch.empty_like(q)
        for number, part in enumerate(self._parts):
            slots = self._tensor("slots", number, q.device)
            gathered = (q, k, v) if slots is None else (t.index_select(0, slots) for t in (q, k, v))
            mixed = self._part(number, held, *gathered).reshape(-1, *q.shape[1:])
            if part.places is not None:
                mixed = mixed.index_select(0, self._tensor("places", number, q.device))  # type: ignore[arg-type]
            out.index_copy_(0, self._tensor("tokens", number, q.device), mixed)  # type: ignore[arg-type]
        return out

    def _part(self, number: int, held: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n · width, H, d], k and v [n · width, K, d] of one part -> [n, width, H, d]."""
        part = self._parts[number]
        q, k, v = (t.view(len(part.rows), part.width, *t.shape[1:]) for t in (q, k, v))
        if not part.past.any() and part.width > FEW:
            return attend(q, k, v, causal=True)
        low, high = int(part.rows[0]), int(part.rows[-1]) + 1
        hidden = self._tensor("hidden", number, q.device)
        if high - low == len(part.rows):
            keys, values = held[:, low:high, :, : part.end]
            return product(q, keys, values, hidden)
        rows = self._tensor("rows", number, q.device)
        assert rows is not None
        if high - low > 2 * len(part.rows):
            keys, values = held[:, :, :, : part.end].index_select(1, rows)
            return product(q, keys, values, hidden)
        # Nearly all rows of a range: queries of the absent rows cost less than a copy of the keys of the others
        keys, values = held[:, low:high, :, : part.end]
        spread = q.new_zeros(high - low, *q.shape[1:]).index_copy(0, rows - low, q)
        if hidden is not None:
            hidden = hidden.new_zeros(high - low, *hidden.shape[1:]).index_copy(0, rows - low, hidden)
        return product(spread, keys, values, hidden).index_select(0, rows - low)

    def _tensor(self, name: str, number: int, device: torch.device) -> Tensor | None:
        """One of the index arrays of a part on a device. All layers of a forward pass share it."""
        key = (name, number, device)
        if key not in self._known:
            array = self._array(name, self._parts[number])
            self._known[key] = None if array is None else to_device(torch.from_numpy(array), device)
        return self._known[key]

    def _array(self, name: str, part: _Part) -> np.ndarray | None:
        if name == "row":
            return np.repeat(self.rows, self.new)
        if name == "column":
            return np.arange(int(self.new.sum())) + np.repeat(self.past - self.first, self.new)
        if name == "hidden":
            seen = part.past[:, None] + np.arange(1, part.width + 1)
            return None if (seen == part.end).all() else seen[:, :, None] <= np.arange(part.end)
        found: np.ndarray | None = getattr(part, name)
        return found


def product(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax(q kᵀ / √d) v: q [n, S, H, d], k and v [n, K, Z, d] -> [n, S, H, d].

    hidden   bool [n, S, Z]: the keys that a query does not see
    """
    s, heads = q.shape[1:3]
    if s > FEW:
        seen = None if hidden is None else ~hidden[:, None]
        share = {"enable_gqa": True} if heads != k.shape[1] else {}
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen, **share).transpose(1, 2)
    return weighted(q, k, v, hidden)[0]


def weighted(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """`product` as plain matrix products, and the logarithm of the sum of exponents that each query divides by, [n, S, H]."""
    n, s, heads, size = q.shape
    kv_heads = k.shape[1]
    # Query heads that share keys become additional queries, so that keys are never copied
    q = (q * size**-0.5).view(n, s, kv_heads, -1, size).permute(0, 2, 3, 1, 4)  # [n, K, H / K, S, d]
    scores = (q.reshape(n, kv_heads, -1, size) @ k.transpose(-1, -2)).float()
    if hidden is not None:
        each = scores.view(n, kv_heads, -1, s, k.shape[2])
        scores = each.masked_fill(hidden[:, None, None], float("-inf")).view(scores.shape)
    total = scores.logsumexp(-1, keepdim=True)
    mixed = (scores - total).exp().to(v.dtype) @ v  # [n, K, H / K · S, d]
    return mixed.view(n, heads, s, size).transpose(1, 2), total.view(n, heads, s).transpose(1, 2)
