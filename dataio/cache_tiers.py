"""The two tiers of `RangeCache`: memory, and a file on disk that outlives the process.

The disk tier never trusts what it reads: every item carries a CRC-32C of its number and its bytes. A file that was cut short or
damaged costs cache misses, nothing else; a disk that fills up makes the tier smaller.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from .episode import DataError
from .slabs import Ints, Slabs

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)
_VERSION = 1
_JOURNAL = 1 << 20  # bytes of the journal, beside what it must hold, before it is rewritten


class MemoryTier:
    """Items in anonymous memory (`view`); pages that were never used take no room."""

    HEADER = 0

    def __init__(self, capacity: int, slab: int, classes: Ints) -> None:
        self.slabs = Slabs(capacity, slab, classes)
        self._map = mmap.mmap(-1, max(self.slabs.count * slab, 1))
        self.view = memoryview(self._map)

    def write(self, address: int, item: int, data: memoryview) -> bool:
        self.view[address : address + len(data)] = data
        return True

    def flush(self) -> None:
        """Nothing to record."""

    def close(self) -> None:
        self.view.release()
        with contextlib.suppress(BufferError):  # a window still views it: the memory goes with the last view
            self._map.close()


class DiskTier:
    """Items in the file `items` of a folder, each behind its CRC-32C; `journal` says which item was written where.

    One process uses a folder at a time (DataError otherwise). What another data set, layout or size of the cache left there is
    discarded. A slot that was freed keeps its bytes until the next item takes it, so the journal records only what is written.
    """

    HEADER = 4  # bytes before each item

    def __init__(self, capacity: int, slab: int, classes: Ints, directory: str, fingerprint: str) -> None:
        os.makedirs(directory, exist_ok=True)
        self.directory, self.shrunk = directory, False
        self._lock = os.open(self._path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise DataError(
                f"cache: {directory} is in use by another process; give each loader its own folder"
            ) from None
        geometry = {
            "version": _VERSION,
            "fingerprint": fingerprint,
            "capacity": capacity,
            "slab": slab,
            "classes": classes.tolist(),
        }
        if self._known() != geometry:
            for name in ("geometry.json", "items", "journal"):
                if os.path.exists(self._path(name)):
                    os.unlink(self._path(name))
        self.slabs = Slabs(capacity, slab, classes)
        self.slabs.adopt(*self._replay())
        self._file = os.open(self._path("items"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._backed: set[int] = set()  # slabs whose room on disk is sure
        self._journal = open(self._path("journal"), "ab", buffering=0)  # noqa: SIM115
        self._pending: list[tuple[int, int, int]] = []
        self._compact()
        with open(self._path("geometry.json"), "w") as file:
            json.dump(geometry, file)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _known(self) -> object:
        try:
            with open(self._path("geometry.json")) as file:
                return json.load(file)
        except (OSError, ValueError):
            return None

    def write(self, address: int, item: int, data: memoryview) -> bool:
        """False where the disk is full: the tier does not grow any more."""
        number = address // self.slabs.slab
        try:
            if number not in self._backed:
                os.posix_fallocate(self._file, number * self.slabs.slab, self.slabs.slab)
                self._backed.add(number)
            check = _check(item, data).to_bytes(self.HEADER, "little")
            if os.pwritev(self._file, [check, data], address) != self.HEADER + len(data):
                raise OSError("short write")
        except OSError as error:
            if not self.shrunk:
                log.warning(
                    "cache: %s takes no more (%s); going on with the %d MiB that it holds",
                    self.directory,
                    error,
                    len(self._backed) * self.slabs.slab >> 20,
                )
            self.shrunk = True
            if number not in self._backed:
                self.slabs.abandon(number)
            self.slabs.drop_empty()
            return False
        self._pending.append((address, item, int(self.slabs.kind[number])))
        return True

    def read(self, address: int, item: int, size: int) -> memoryview | None:
        """The item's bytes; None where they are not what was written."""
        try:
            data = os.pread(self._file, self.HEADER + size, address)
        except OSError:
            return None
        view = memoryview(data)[self.HEADER :]
        if len(view) != size or int.from_bytes(data[: self.HEADER], "little") != _check(item, view):
            return None
        return view

    def flush(self) -> None:
        """Records what was written since the last time."""
        if self._pending:
            records = np.array(self._pending, np.int64)
            self._pending.clear()
            try:
                self._journal.write(records.tobytes())
            except OSError:
                self.shrunk = True  # what is not recorded is only unknown after a restart
            self._compact()

    def _replay(self) -> tuple[Ints, Ints, Ints]:
        """Address, item and class of what the folder holds: the last record of each address, of each slab's last class."""
        none = (np.zeros(0, np.int64),) * 3
        if not os.path.exists(self._path("journal")):
            return none
        raw = np.fromfile(self._path("journal"), np.int64)
        records = raw[: len(raw) // 3 * 3].reshape(-1, 3)[::-1]
        slab = records[:, 0] // self.slabs.slab
        valid = (records[:, 0] >= 0) & (slab < self.slabs.count) & (records[:, 1] >= 0)
        valid &= (records[:, 2] >= 0) & (records[:, 2] < len(self.slabs.classes))
        records, slab = records[valid], slab[valid]
        if not len(records):
            return none
        numbers, last = np.unique(slab, return_index=True)
        kind_of = np.full(self.slabs.count, -1, np.int64)
        kind_of[numbers] = records[last, 2]
        records = records[records[:, 2] == kind_of[slab]]
        records = records[np.unique(records[:, 0], return_index=True)[1]]
        records = records[
            np.unique(records[:, 1], return_index=True)[1]
        ]  # an item that lies in two places: one will do
        slot = self.slabs.classes[records[:, 2]]
        within = records[:, 0] % self.slabs.slab
        records = records[(within % slot == 0) & (within // slot < self.slabs.slots[records[:, 2]])]
        return records[:, 0], records[:, 1], records[:, 2]

    def _compact(self) -> None:
        """Rewrites a journal that has grown much longer than what it says."""
        address, item, kind = self.slabs.contents()
        if self._journal.tell() < _JOURNAL + 4 * 24 * len(address):
            return
        with open(self._path("journal.new"), "wb") as file:
            file.write(np.stack([address, item, kind], axis=1).tobytes())
        os.replace(self._path("journal.new"), self._path("journal"))
        self._journal.close()
        self._journal = open(self._path("journal"), "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        self.flush()
        self._journal.close()
        os.close(self._file)
        os.close(self._lock)


def _check(item: int, data: Buffer) -> int:
    return crc32c(data, crc32c(item.to_bytes(8, "little")))
