"""Slabs: room for items of unequal sizes in one piece of bytes, without ever needing more, and without moving items.

The piece is cut into slabs of equal size; a slab holds items of one size class, and an empty one may change its class. Classes
are made for the sizes that the data have: the frequent ones fit exactly, the others lose little.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ALIGN = 8  # every item begins at a multiple of this
_SMALLEST = 64
_PER_OCTAVE = 16


def size_classes(sample: Ints, slabs: int, slab: int) -> Ints:
    """Sizes of slots, ascending, for items like those of a sample of sizes: at most a quarter as many as there are slabs.

    Sizes that make up much of the bytes have a class of their own; between them stand classes in a geometric row.
    """
    most = max(4, slabs // 8)
    rounded = np.maximum(-(-sample // ALIGN) * ALIGN, _SMALLEST)
    rounded = rounded[rounded <= slab]
    sizes, counts = np.unique(rounded, return_counts=True)
    share = sizes * counts / max(float((sizes * counts).sum()), 1.0)
    frequent = sizes[np.argsort(-share, kind="stable")[:most]]
    frequent = frequent[share[np.searchsorted(sizes, frequent)] >= 0.5 / most]
    lowest, highest = int(rounded.min(initial=slab)), slab
    steps = min(_PER_OCTAVE * (np.log2(highest / lowest) + 1), most)
    row = np.geomspace(lowest, highest, max(2, int(steps)))
    return np.unique(np.concatenate([frequent, -(-row.astype(np.int64) // ALIGN) * ALIGN, [slab]])).astype(np.int64)


def slab_size(capacity: int, sample: Ints) -> int:
    """A power of two: about a thousandth of the capacity, with room for eight of the largest items where the capacity allows."""
    largest = int(sample.max(initial=_SMALLEST))
    size = max(16 << 10, capacity // 1024, 8 * largest)
    size = 2 ** (int(size) - 1).bit_length()
    while size * 64 > capacity and size // 2 >= largest:
        size //= 2
    return size


class Slabs:
    """Who lies where. Addresses are bytes from the piece's beginning.

    owner  int64 [slabs, slots]: the number of the item in each slot plus 1; 0: none, so that untouched memory costs nothing
    """

    def __init__(self, capacity: int, slab: int, classes: Ints) -> None:
        self.slab, self.classes = slab, classes
        self.count = capacity // slab
        self.slots = slab // classes  # slots of a slab, by class
        self.owner = np.zeros((self.count, int(self.slots.max())), np.int64)
        self.kind = np.full(self.count, -1, np.int32)  # class of each slab, −1: empty
        self.live = np.zeros(self.count, np.int64)
        self._empty = np.arange(self.count)[::-1].tolist()
        self._free: list[list[Ints]] = [[] for _ in classes]  # addresses, by class
        self._gone: set[int] = set()

    def adopt(self, addresses: Ints, items: Ints, kinds: Ints) -> None:
        """Takes over what lies somewhere already; before anything else is done."""
        slab = addresses // self.slab
        self.kind[slab] = kinds
        self.owner[slab, addresses % self.slab // self.classes[kinds]] = items + 1
        np.add.at(self.live, slab, 1)
        self._empty = np.flatnonzero(self.kind < 0)[::-1].tolist()
        for s in np.flatnonzero(self.kind >= 0).tolist():
            self._offer(s, np.flatnonzero(self.owner[s, : self.slots[self.kind[s]]] == 0))

    def contents(self) -> tuple[Ints, Ints, Ints]:
        """Address, item and class of everything."""
        slab, slot = np.nonzero(self.owner)
        kind = self.kind[slab].astype(np.int64)
        return slab * self.slab + slot * self.classes[kind], self.owner[slab, slot] - 1, kind

    def class_of(self, sizes: Ints) -> Ints:
        """Class of each size; len(classes) where an item is too large."""
        return np.searchsorted(self.classes, sizes)

    def slot_bytes(self, addresses: Ints) -> Ints:
        """Bytes of the slots at some addresses."""
        return self.classes[self.kind[addresses // self.slab]]

    @property
    def used(self) -> int:
        """Bytes of all slabs in use."""
        return int((self.kind >= 0).sum()) * self.slab

    def take(self, kind: int, items: Ints) -> Ints:
        """Slots for items of one class: addresses of as many as have room (a prefix of `items`)."""
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
        """Frees slots."""
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
        """An empty slab may take any class again."""
        kind = int(self.kind[s])
        free = np.concatenate(self._free[kind])
        self._free[kind] = [free[free // self.slab != s]]
        self.kind[s] = -1
        if s not in self._gone:
            self._empty.append(s)

    def emptiest(self) -> Ints:
        """Items of the slab in use that holds the least bytes."""
        used = np.flatnonzero(self.kind >= 0)
        if not len(used):
            return np.zeros(0, np.int64)
        s = used[np.argmin(self.live[used] * self.classes[self.kind[used]])]
        row = self.owner[s, : self.slots[self.kind[s]]]
        return np.asarray(row[row > 0], np.int64) - 1

    def abandon(self, s: int) -> None:
        """Never uses a slab again; items that lie there are still to be given back."""
        kind = int(self.kind[s])
        self._free[kind] = [free[free // self.slab != s] for free in self._free[kind]]
        self._gone.add(s)

    def drop_empty(self) -> None:
        """Gives up slabs that are not in use now: the piece cannot grow to hold them."""
        self._gone.update(self._empty)
        self._empty.clear()
