"""Windows -> TokenBatch. Positions, segments and targets are laid out only here, for training and for acting.

This runs in the loader, so all windows of one task are laid out together: no Python code runs for each token, little for each
window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiphys.dataio.episode import DataError, Window
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.draft import Draft, Keys, Placed, concealed
from tiphys.pretrain.tokens.group import Group, Layouts, make_groups, sizes, split
from tiphys.pretrain.tokens.swap import swaps
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.vocabulary import Vocabulary

__all__ = ["Layouts", "Placed", "assemble", "placements"]


def assemble(
    step: int,
    rows: np.ndarray,
    windows: Sequence[Sequence[Window]],
    layouts: Layouts,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    *,
    length: int | None = None,
    seed: int = 0,
    training: bool = True,
) -> TokenBatch:
    """The TokenBatch of rows [R] of the global batch, each with its windows in order.

    The target of a predicted position stands at the position before it, in the same segment, or, if the layout is seen from both
    sides, at the position itself. A prompt has no targets. What layouts with `hiding` hide depends on (seed, step, row, number
    of the window in its row); without `training` the step is 0.
    `length` None: the rows are as long as the longest. Raises DataError if a window lacks a field or has a value without
    encoding, or if a row needs more than `length` positions.
    """
    flat = [w for row in windows for w in row]
    row_of = np.repeat(np.arange(len(windows)), [len(row) for row in windows])
    slot = np.arange(len(flat)) - np.searchsorted(row_of, row_of)
    pieces = split(flat, layouts)
    of = np.array([piece.of for piece in pieces], np.int64)
    row_of, slot = row_of[of], slot[of]
    groups = make_groups(pieces, vocabulary, text)
    keys = [(seed, step if training else 0, np.asarray(rows)[row_of[g.number]], slot[g.number]) for g in groups]
    for group, key in zip(groups, keys, strict=True):
        _swap(group, row_of[group.number], key)
    size = sizes(groups, len(pieces))
    used = np.bincount(row_of, size, minlength=len(windows)).astype(np.int64)
    length = int(used.max(initial=1)) if length is None else length
    if (used > length).any():
        at = int(used.argmax())
        raise DataError(f"row {int(rows[at])} of the batch has {int(used[at])} tokens, but a row holds {length}")
    start = row_of * length + np.cumsum(size) - size - (np.cumsum(used) - used)[row_of]
    draft = Draft(np.asarray(rows, np.int64), length, vocabulary)
    draft.lay_windows(pieces, size, start, row_of)
    for group, key in zip(groups, keys, strict=True):
        draft.lay(group, start[group.number], concealed(group, key), key if training else None)
    draft.pair(groups, of, row_of, start + size - 1)
    return draft.finish(step, seed, training)


def _swap(group: Group, row_of: np.ndarray, keys: Keys) -> None:
    """Lets windows of a group show each other's texts, if their layout says so."""
    if not group.layout.swap:
        return
    texts = [ids.tobytes() for ids in group.heads]
    given = swaps(texts, row_of, group.layout.swap, keys)
    group.heads = [group.heads[i] for i in given.tolist()]
    group.swapped = given != np.arange(len(given))


def placements(
    windows: Sequence[Window],
    layouts: Layouts,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    drawn: tuple[int, int, int] = (0, 0, 0),
) -> list[Placed]:
    """Where `assemble` puts every element of the windows of one row, by position.

    drawn  seed, training step (0 if not in training) and number of the row, if texts are swapped
    """
    pieces = split(windows, layouts)
    groups = make_groups(pieces, vocabulary, text)
    for group in groups:
        slot = np.array([pieces[i].of for i in group.number.tolist()], np.int64)
        _swap(group, np.zeros_like(slot), (drawn[0], drawn[1], np.full_like(slot, drawn[2]), slot))
    size = sizes(groups, len(pieces))
    start = np.cumsum(size) - size
    found: list[Placed] = []
    for group in groups:
        body = start[group.number] + group.head_size()
        tail = body + group.body_size()
        numbers = [pieces[i].of for i in group.number.tolist()]
        for firsts, counts in ((start[group.number], group.head_size()), (tail, group.tail_size())):
            for window, first, n in zip(numbers, firsts.tolist(), counts.tolist(), strict=True):
                if n:
                    found.append(Placed(window, None, None, first, n))
        cells = group.cells(body, -1)
        for owner, step, row in zip(group.owner, group.shown_steps(), cells):
            for element, column in zip(group.layout.elements, group.layout.columns, strict=True):
                at = row[column : column + element.size]
                at = at[at >= 0]
                if len(at):
                    found.append(Placed(numbers[owner], int(step), element, int(at[0]), len(at)))
    return sorted(found, key=lambda placed: placed.first)
