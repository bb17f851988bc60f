"""Slabs: items of different sizes in one piece of bytes of fixed size. Items are never moved.

The piece is cut into slabs of equal size. A slab holds items of one size class; an empty slab may change its class. The classes
are chosen for the sizes that occur in the data: frequent sizes fit exactly, the others waste little.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ALIGN = 8  # every item begins at a multiple of this
_SMALLEST = 64  # bytes of the smallest slot
_CANDIDATES = 256  # most sizes that are considered as classes
_PAGE = 4096


def size_classes(sample: Ints, slabs: int, slab: int) -> Ints:
    """Sizes of slots, ascending, that waste least on items whose sizes are like `sample`. The last one is a whole slab.

    There are at most slabs / 8 classes (but 4 at least), because each class may leave a slab half empty. If there are fewer
    different sizes than that, each size fits exactly.
    """
    most = max(4, slabs // 8)
    rounded = np.maximum(-(-sample // ALIGN) * ALIGN, _SMALLEST)
    sizes, counts = np.unique(rounded[rounded <= slab], return_counts=True)
    if len(sizes) > _CANDIDATES:  # groups of equal counts; a frequent size ends its group
        group = (np.cumsum(counts) - counts) * _CANDIDATES // counts.sum()
        last = np.append(np.flatnonzero(np.diff(group)), len(sizes) - 1)
        sizes, counts = sizes[last], np.diff(np.concatenate([[0], np.cumsum(counts)[last]]))
    chosen = sizes if len(sizes) <= most else sizes[_partition(sizes, counts, most)]
    # Bytes that would be left over at a slab's end are given to its slots.
    return np.unique(np.append(slab // (slab // chosen) // ALIGN * ALIGN, slab)).astype(np.int64)


def _partition(sizes: Ints, counts: Ints, classes: int) -> Ints:
    """Which of the sizes become classes, so that rounding every size up to the next class wastes the fewest bytes."""
    n = len(sizes)
    number = np.concatenate([[0], np.cumsum(counts)])
    total = np.concatenate([[0], np.cumsum(counts * sizes)])
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    # waste[i, j]: bytes wasted if sizes i … j share the class of size j
    waste = np.where(i <= j, sizes[j] * (number[j + 1] - number[i]) - (total[j + 1] - total[i]), np.inf)
    best, before = waste[0].astype(np.float64), []
    for _ in range(classes - 1):
        through = np.concatenate([[np.inf], best[:-1]])[:, None] + waste  # [first of the last class, its size]
        before.append(np.argmin(through, axis=0))
        best = np.minimum(best, through.min(axis=0))
    chosen, last = [], n - 1
    for first in reversed(before):
        chosen.append(last)
        if first[last] == 0 or last == 0:
            break
        last = int(first[last]) - 1
    else:
        chosen.append(last)
    return np.unique(np.array(chosen, np.int64))


def slab_size(capacity: int, sample: Ints) -> int:
    """Bytes of a slab: about a thousandth of the capacity, with room for eight of the largest items if the capacity allows it.

    Among such sizes, the one whose slabs leave the fewest bytes over when they are filled with items like those of `sample`.
    """
    largest = int(sample.max(initial=_SMALLEST))
    size = max(16 << 10, capacity // 1024, 8 * largest)
    size = 2 ** (int(size) - 1).bit_length()
    while size * 64 > capacity and size // 2 >= largest:
        size //= 2
    items, counts = np.unique(np.maximum(sample, _SMALLEST), return_counts=True)
    if len(items) > _CANDIDATES:
        some = np.linspace(0, len(items) - 1, _CANDIDATES).astype(np.int64)
        items, counts = items[some], counts[some]
    sizes = np.arange(size, max(3 * size // 4, largest) - 1, -_PAGE)
    left_over = (sizes[:, None] // (sizes[:, None] // items) - items) @ counts
    return int(sizes[np.argmin(left_over)])


class Slabs:
    """Which item lies where. An address is a number of bytes from the piece's beginning.

    owner  int64 [slabs, slots]: number of the item in each slot, plus 1; 0: none, so that unused rows take no memory
    kind   int32 [slabs]: class of each slab; −1: empty
    live   int64 [slabs]: number of items in each slab
    """

    def __init__(self, capacity: int, slab: int, classes: Ints) -> None:
        self.slab, self.classes = slab, classes
        self.count = capacity // slab
        self.slots = slab // classes  # slots of a slab, by class
        self.owner = np.zeros((self.count, int(self.slots.max())), np.int64)
        self.kind = np.full(self.count, -1, np.int32)
        self.live = np.zeros(self.count, np.int64)
        self._empty = np.arange(self.count)[::-1].tolist()
        self._free: list[list[Ints]] = [[] for _ in classes]  # addresses, by class
        self._gone: set[int] = set()  # slabs that are never used again

    def adopt(self, addresses: Ints, items: Ints, kinds: Ints) -> None:
        """Take over items that already lie in the piece. To be called before anything else."""
        slab = addresses // self.slab
        self.kind[slab] = kinds
        self.owner[slab, addresses % self.slab // self.classes[kinds]] = items + 1
        np.add.at(self.live, slab, 1)
        self._empty = np.flatnonzero(self.kind < 0)[::-1].tolist()
        for s in np.flatnonzero(self.kind >= 0).tolist():
            self._offer(s, np.flatnonzero(self.owner[s, : self.slots[self.kind[s]]] == 0))

    def contents(self) -> tuple[Ints, Ints, Ints]:
        """Address, item and class of all items."""
        slab, slot = np.nonzero(self.owner)
        kind = self.kind[slab].astype(np.int64)
        return slab * self.slab + slot * self.classes[kind], self.owner[slab, slot] - 1, kind

    def class_of(self, sizes: Ints) -> Ints:
        """Class of each size; `len(classes)` if an item is too large."""
        return np.searchsorted(self.classes, sizes)

    def kinds_like(self, sizes: Ints) -> NDArray[np.bool_]:
        """Mask of the classes of items of these sizes."""
        mask = np.zeros(len(self.classes) + 1, bool)
        mask[self.class_of(sizes)] = True
        return mask[:-1]

    def slot_bytes(self, addresses: Ints) -> Ints:
        """Bytes of the slots at these addresses."""
        return self.classes[self.kind[addresses // self.slab]]

    @property
    def used(self) -> int:
        """Bytes of all slabs in use."""
        return int((self.kind >= 0).sum()) * self.slab

    @property
    def free(self) -> int:
        """Bytes of all empty slabs that may be used."""
        return len(self._empty) * self.slab

    def withhold(self, size: int) -> list[int]:
        """Take empty slabs of `size` bytes or more together out of use until they are released. There must be as many."""
        number = -(-size // self.slab)
        assert number <= len(self._empty)
        withheld, self._empty = self._empty[:number], self._empty[number:]
        return withheld

    def release(self, slabs: list[int]) -> None:
        """Make withheld slabs usable again."""
        self._empty[:0] = slabs

    def take(self, kind: int, items: Ints) -> Ints:
        """Take slots for items of one class. Returns their addresses, for as many items as have room (a prefix of `items`)."""
        found: list[Ints] = []
        wanted = len(items)
        while wanted:
            if self._free[kind]:
                some = self._free[kind].pop()
                part, rest = some[:wanted], some[wanted:]
                if len(rest):
                    self._free[kind].append(rest)
                found.append(part)
                wanted -= len(part)
            elif self._empty:
                s = self._empty.pop()
                self.kind[s] = kind
                self._offer(s, np.arange(self.slots[kind]))
            else:
                break
        out = np.concatenate(found) if found else np.zeros(0, np.int64)
        slab = out // self.slab
        self.owner[slab, (out % self.slab) // self.classes[kind]] = items[: len(out)] + 1
        np.add.at(self.live, slab, 1)
        return out

    def give(self, addresses: Ints) -> None:
        """Free the slots at these addresses."""
        if not len(addresses):
            return
        slab = addresses // self.slab
        kinds = self.kind[slab]
        slot = (addresses % self.slab) // self.classes[kinds]
        self.owner[slab, slot] = 0
        np.subtract.at(self.live, slab, 1)
        usable = ~np.isin(slab, list(self._gone)) if self._gone else np.ones(len(slab), bool)
        for kind in np.unique(kinds).tolist():
            self._free[kind].append(addresses[usable & (kinds == kind)])
        for s in np.unique(slab[self.live[slab] == 0]).tolist():
            self._retire(s)

    def _offer(self, s: int, slots: Ints) -> None:
        kind = int(self.kind[s])
        if len(slots):
            self._free[kind].append(s * self.slab + slots * self.classes[kind])

    def _retire(self, s: int) -> None:
        """Let an empty slab take any class again."""
        kind = int(self.kind[s])
        free = np.concatenate(self._free[kind])
        self._free[kind] = [free[free // self.slab != s]]
        self.kind[s] = -1
        if s not in self._gone:
            self._empty.append(s)

    def emptiest(self, kinds: NDArray[np.bool_]) -> Ints:
        """The items of the slab that holds the fewest bytes, among the slabs of the classes `kinds` (a mask). Empty if there is
        no such slab."""
        used = np.flatnonzero(np.append(kinds, False)[self.kind])
        if not len(used):
            return np.zeros(0, np.int64)
        s = used[np.argmin(self.live[used] * self.classes[self.kind[used]])]
        row = self.owner[s, : self.slots[self.kind[s]]]
        return np.asarray(row[row > 0], np.int64) - 1

    def abandon(self, s: int) -> None:
        """Never use a slab again. Items that lie in it must still be given back."""
        kind = int(self.kind[s])
        self._free[kind] = [free[free // self.slab != s] for free in self._free[kind]]
        self._gone.add(s)

    def drop_empty(self) -> None:
        """Never use the slabs that are empty now, because the piece cannot grow to hold them."""
        self._gone.update(self._empty)
        self._empty.clear()
