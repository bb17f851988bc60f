"""The last text before a value in its window, which embedders with FiLM read: an instruction, most often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tiphys.pretrain.tokens.batch import TokenBatch

_TEXT = 1  # `TEXT` of batch.py, which imports this file


class Earlier(NamedTuple):
    """The last text of a window before the first position of a row.

    ids   its tokens
    open  its last token stands right before that position, so a text that the row begins with is the rest of it
    """

    ids: tuple[int, ...] = ()
    open: bool = False


def last_texts(batch: TokenBatch) -> np.ndarray:
    """The number (1, 2, …) of the last text up to each position of its window, int64 [R, L]; 0: none in this row.

    A text is a run of text tokens of one window.
    """
    window = (np.arange(batch.rows)[:, None] << 32 | batch.segment).reshape(-1)
    is_text = ((batch.modality == _TEXT) & (batch.segment > 0)).reshape(-1)
    begins = is_text.copy()
    begins[1:] &= ~is_text[:-1] | (window[1:] != window[:-1])
    number = np.maximum.accumulate(np.where(begins, np.cumsum(begins), 0))
    first = np.concatenate([[-1], window[begins]])  # the window of each text; no window is -1
    return np.where(first[number] == window, number, 0).reshape(batch.segment.shape)


def texts_before(batch: TokenBatch, rows: np.ndarray, columns: np.ndarray) -> list[Earlier]:
    """The last text of the window before each of these positions, one for each row and column given. A row is one window."""
    if batch.earlier is None and not (batch.modality == _TEXT).any():
        return [Earlier()] * len(rows)
    last = last_texts(batch)
    out = []
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        before = batch.earlier[row] if batch.earlier is not None else Earlier()
        real = np.flatnonzero(batch.segment[row, :column] > 0)
        number = int(last[row, real[-1]]) if len(real) else 0
        if number:
            text = np.flatnonzero((last[row, :column] == number) & (batch.modality[row, :column] == _TEXT))
            joins = before.open and text[0] == real[0]
            ids = (*(before.ids if joins else ()), *batch.tokens[row, text].tolist())
            before = Earlier(ids, text[-1] == column - 1)
        elif len(real):
            before = before._replace(open=False)
        out.append(before)
    return out


def text_arrays(batch: TokenBatch, place: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    """The texts that stand before the embedded values of a batch. A text belongs to a value if no other text is between them.

    Parameters
    ----------
    batch : TokenBatch
        At least one value is embedded.
    place : ndarray, int64 [R · L]
        The compact place of each position.
    tokens : int
        Number of compact places.

    Returns
    -------
    dict
        texts/place          int64 [m]: compact places of the texts' tokens; `tokens` + i is the i-th of `texts/earlier`
        texts/earlier        int32 [k]: ids of texts that are not in the batch (`TokenBatch.earlier`)
        texts/number         int64 [m]: 1, 2, …: the text that each of them belongs to
        texts/size           int32 [1 + texts]: number of tokens of each text; text 0 is no text, and counts as one token
        embedded/NAME/text   int64 [n]: the text of each value
    """
    last = last_texts(batch)
    text = np.flatnonzero((batch.modality == _TEXT) & (batch.segment > 0))
    number, ids = last.reshape(-1)[text], np.zeros(0, np.int32)
    if batch.earlier is not None:
        last, more, ids = _with_earlier(batch, last, batch.earlier)
        text, number = np.concatenate([text, -1 - np.arange(len(ids))]), np.concatenate([number, more])
    found = {name: last.reshape(-1)[e.index] for name, e in batch.embedded.items()}
    known = np.unique(np.concatenate([np.zeros(1, np.int64), *found.values()]))  # 0 is the first of them
    used = np.isin(number, known)
    text, number = text[used], np.searchsorted(known, number[used])
    size = np.bincount(number, minlength=len(known))
    size[0] = 1
    out = {
        "texts/place": np.where(text < 0, tokens - 1 - text, place[np.maximum(text, 0)]),
        "texts/earlier": ids,
        "texts/number": number,
        "texts/size": size.astype(np.int32),
    }
    return out | {f"embedded/{name}/text": np.searchsorted(known, one) for name, one in found.items()}


def _with_earlier(
    batch: TokenBatch, last: np.ndarray, earlier: Sequence[Earlier]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`last_texts` with the texts before the rows, and the number and id of each of the tokens of those."""
    last, fresh = last.copy(), int(last.max(initial=0))
    numbers, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for row, before in enumerate(earlier):
        real = np.flatnonzero(batch.segment[row] > 0)
        if not before.ids or not len(real):
            continue
        fresh += 1
        first = int(last[row, real[0]])
        if not before.open:
            first = 0
        last[row, real] = np.where(last[row, real] == 0, first or fresh, last[row, real])
        numbers.append(np.full(len(before.ids), first or fresh))
        ids.append(np.array(before.ids, np.int32))
    return last, np.concatenate(numbers), np.concatenate(ids)
