"""Finished batches in shared memory: slots of one anonymous file that the loader process fills and the trainer reads.

The file has no name (memfd), so there is nothing to clean up: the kernel frees it when both processes have ended, in whatever
way. The file is sparse: each slot has a fixed place, far from the next one, and takes only the memory that it uses.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tiphys.dataio.loading import decode_note

SLOTS = 64
_SPACING = 1 << 36  # bytes from one slot's beginning to the next one's
_ALIGNMENT = 64
_GRAIN = 1 << 16  # bytes to which mappings are rounded up
NOTE = SLOTS * _SPACING  # where the note of `decode_note` is


class ArrayPlace(NamedTuple):
    """Where an array lies in a slot."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # within the slot


def create() -> int:
    """Make an anonymous, sparse shared memory file with room for all slots. Returns its file descriptor."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tiphys-batches", os.MFD_CLOEXEC)
    else:  # not Linux: a file on disk without a name
        fd, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(fd, NOTE + decode_note.SIZE)
    return fd


def layout(arrays: Mapping[str, np.ndarray]) -> tuple[list[ArrayPlace], int]:
    """Where each array goes in a slot, and the bytes of all. Raises TypeError if an array is not plain memory."""
    places, offset = [], 0
    for name, array in arrays.items():
        if array.dtype.hasobject or array.dtype.kind == "T":
            raise TypeError(
                f"make_batch: array {name!r} has dtype {array.dtype}, which cannot go through shared memory; return "
                "numbers instead of objects or strings"
            )
        places.append(ArrayPlace(name, array.dtype.str, array.shape, offset))
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, offset


class SlotWriter:
    """The loader's side: which slots are free, and how many may be used within `limit` bytes (at least two)."""

    def __init__(self, fd: int, limit: int):
        self.fd, self.limit = fd, limit
        self.bytes = 0  # of all mapped slots
        self._slot_bytes = 0  # bytes of a new slot: room for the largest batch so far
        self._maps: dict[int, mmap.mmap] = {}
        self._busy: set[int] = set()

    @property
    def allowed(self) -> int:
        """How many slots may be in use at a time."""
        return min(SLOTS, max(2, self.limit // self._slot_bytes)) if self._slot_bytes else SLOTS

    def acquire(self, size: int) -> int | None:
        """A free slot of at least `size` bytes, or None while all are in use."""
        if size > _SPACING:
            raise ValueError(
                f"a batch of {size} bytes is larger than a slot of shared memory ({_SPACING} bytes); use fewer rows"
            )
        if size > self._slot_bytes:
            self._slot_bytes = -(-(size + size // 8) // _GRAIN) * _GRAIN
            for slot in [s for s in self._maps if s >= self.allowed and s not in self._busy]:
                self._drop(slot)
        free = [s for s in range(self.allowed) if s not in self._busy]
        if not free or len(self._busy) >= self.allowed:
            return None
        slot = free[0]
        held = self._maps.get(slot)
        if held is None or len(held) < self._slot_bytes:
            if held is not None:
                self._drop(slot)
            self._maps[slot] = mmap.mmap(self.fd, self._slot_bytes, offset=slot * _SPACING)
            self.bytes += self._slot_bytes
        self._busy.add(slot)
        return slot

    def write(self, slot: int, places: list[ArrayPlace], arrays: Mapping[str, np.ndarray]) -> None:
        memory = np.frombuffer(self._maps[slot], np.uint8)
        for place in places:
            array = arrays[place.name]
            target = memory[place.offset : place.offset + array.nbytes].view(place.dtype).reshape(place.shape)
            np.copyto(target, array)

    def release(self, slot: int) -> None:
        self._busy.discard(slot)
        if slot >= self.allowed and slot in self._maps:
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        size = len(self._maps.pop(slot))  # NumPy's views may keep the mapping alive, but its pages are freed below
        self.bytes -= size
        _punch_hole(self.fd, slot * _SPACING, size)


class SlotReader:
    """The trainer's side: NumPy views of the arrays in a slot."""

    def __init__(self, fd: int):
        self.fd = fd
        self._maps: dict[int, np.ndarray] = {}

    def memory(self, slot: int, size: int) -> tuple[np.ndarray, bool]:
        """The slot's memory, uint8 [at least `size`], and whether it is newly mapped (so that a caller can pin it once)."""
        held = self._maps.get(slot)
        if held is not None and len(held) >= size:
            return held, False
        size = -(-size // _GRAIN) * _GRAIN
        self._maps[slot] = np.frombuffer(mmap.mmap(self.fd, size, offset=slot * _SPACING), np.uint8)
        return self._maps[slot], True

    @staticmethod
    def arrays(memory: np.ndarray, places: list[ArrayPlace]) -> dict[str, np.ndarray]:
        out = {}
        for place in places:
            dtype = np.dtype(place.dtype)
            size = dtype.itemsize * int(np.prod(place.shape, dtype=np.int64))
            out[place.name] = memory[place.offset : place.offset + size].view(dtype).reshape(place.shape)
        return out


def _punch_hole(fd: int, offset: int, size: int) -> None:
    """Free a slot's pages (fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(fd, 3, ctypes.c_int64(offset), ctypes.c_int64(size)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate on the loader's shared memory")
