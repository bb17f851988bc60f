"""The two tiers of `RangeCache`: memory, and a file on disk that outlives the process.

The disk tier never trusts what it reads: every item carries a CRC-32C of its number and its bytes. A file that was truncated or
damaged costs cache misses and nothing else. If the disk becomes full, the tier becomes smaller.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from tiphys.dataio.atomic import write_json
from tiphys.dataio.caching.slabs import Ints, Slabs
from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger
from tiphys.dataio.private import is_private, open_private, private_folder, read_private

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logger(__name__)
_VERSION = 1
_LEAVING = 2.0  # seconds to wait for the process that used a folder before to end
_JOURNAL = 1 << 20  # bytes that the journal may hold beside what is needed, before it is rewritten
_RECORD = 24  # bytes of an item's record in the journal
_RECORDS = 2  # records an item, on average, before the journal is rewritten


def room_for_items(disk: int, item: float) -> int:
    """Bytes that a disk tier has for items of this mean size, if all its files together take at most `disk` bytes: the rest is
    for the journal, and for the new one while it is rewritten."""
    return int((disk - min(_JOURNAL, disk // 64)) / (1 + (_RECORDS + 1) * _RECORD / max(item, 1.0)))


class MemoryTier:
    """Items in anonymous memory (`view`). Pages that were never used take no memory."""

    HEADER = 0

    def __init__(self, capacity: int, slab: int, classes: Ints) -> None:
        self.slabs = Slabs(capacity, slab, classes)
        self._map = mmap.mmap(-1, max(self.slabs.count * slab, 1))
        self.view = memoryview(self._map)

    def write(self, addresses: Ints, items: Ints, data: Mapping[int, Any]) -> NDArray[np.bool_]:
        """Write each item at its address. Returns a mask of the items that could be written: here all."""
        view = self.view
        for address, item in zip(addresses.tolist(), items.tolist()):
            one = data[item]
            view[address : address + len(one)] = one
        return np.ones(len(items), bool)

    def flush(self) -> None:
        """Nothing to record."""

    def close(self) -> None:
        self.view.release()
        with contextlib.suppress(BufferError):  # a window still views it: the memory is freed with the last view
            self._map.close()


class DiskTier:
    """Items in the file `items` of a folder, each after its CRC-32C. The file `journal` says which item was written where.

    Only one process may use a folder at a time. What was left there for another dataset or other units is discarded. If only
    the capacity is different (the node has more or fewer loaders than before), the slabs within the new capacity stay as they
    are. A freed slot keeps its bytes until the next item is written there, so the journal records only what is written.

    Raises DataError if another process uses the folder, if it cannot be written, or if another user may have written to it.
    """

    HEADER = 4  # bytes before each item

    def __init__(self, capacity: int, slab: int, classes: Ints, directory: str, fingerprint: str) -> None:
        self.directory, self.shrunk = directory, False
        try:
            private_folder(directory)
            self._lock = _locked(directory)
            self._open(capacity, slab, classes, fingerprint)
        except OSError as error:
            raise DataError(
                f"cache: {directory} cannot be used: {error.strerror or error}. data.cache.dir must name a folder on a local "
                "disk that this user may write to; with data.cache.disk: 0GiB no folder is needed"
            ) from error

    def _open(self, capacity: int, slab: int, classes: Ints, fingerprint: str) -> None:
        """Find what the folder holds, if it has this fingerprint, and prepare it for writing."""
        directory = self.directory
        known = known_geometry(directory, fingerprint)
        if known is not None and capacity // 4 <= known["capacity"] <= capacity * 4:
            slab, classes = known["slab"], np.array(known["classes"], np.int64)
        else:
            known = None
            for name in ("geometry.json", "items", "journal"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path(name))
        self.slabs = Slabs(capacity, slab, classes)
        self.slabs.adopt(*self._replay())
        self._file = open_private(self._path("items"), os.O_RDWR | os.O_CREAT)
        if os.fstat(self._file).st_size > self.slabs.count * slab:
            os.ftruncate(self._file, self.slabs.count * slab)
        self._backed: set[int] = set()  # slabs whose room on disk is allocated
        journal = open_private(self._path("journal"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._journal = open(journal, "ab", buffering=0)  # noqa: SIM115
        self._pending: list[tuple[int, int, int]] = []
        self._slack = min(_JOURNAL, capacity // 64)
        self._patience = 1  # factor of the length that the journal may reach; doubled if rewriting it failed
        self._compact()
        geometry = {"version": _VERSION, "fingerprint": fingerprint, "capacity": capacity, "slab": slab}
        if known is None or known["capacity"] != capacity:
            try:
                write_json(self._path("geometry.json"), {**geometry, "classes": classes.tolist()})
            except OSError as error:  # a full disk
                log.warning(
                    "cache: %s: geometry.json cannot be written (%s); what is cached there will not be found after a restart",
                    directory,
                    error,
                )

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def write(self, addresses: Ints, items: Ints, data: Mapping[int, Any]) -> NDArray[np.bool_]:
        """Write each item at its address. Returns a mask of the items that could be written. On a full disk the tier no longer
        grows."""
        return np.array([self._write(a, i, data[i]) for a, i in zip(addresses.tolist(), items.tolist())], bool)

    def _write(self, address: int, item: int, data: memoryview) -> bool:
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
                    "cache: %s takes no more data (%s); continuing with the %d MiB that it holds",
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
        """The item's bytes; None if they are not what was written."""
        try:
            data = os.pread(self._file, self.HEADER + size, address)
        except OSError:
            return None
        view = memoryview(data)[self.HEADER :]
        if len(view) != size or int.from_bytes(data[: self.HEADER], "little") != _check(item, view):
            return None
        return view

    def flush(self) -> None:
        """Record in the journal what was written since the last call."""
        if self._pending:
            records = np.array(self._pending, np.int64)
            self._pending.clear()
            whole = self._journal.tell()
            try:
                if self._journal.write(records.tobytes()) != records.nbytes:
                    self._journal.truncate(whole)  # after half a record, all later ones would be misread
                    self._journal.seek(whole)
            except OSError:
                self.shrunk = True  # what is not recorded will only be unknown after a restart
            self._compact()

    def _replay(self) -> tuple[Ints, Ints, Ints]:
        """Address, item and class of what the folder holds: the last record of each address that has its slab's last class."""
        none = (np.zeros(0, np.int64),) * 3
        try:
            with read_private(self._path("journal")) as file:
                raw = np.fromfile(file, np.int64)
        except FileNotFoundError:
            return none
        except OSError as error:
            log.warning("cache: %s: its contents are not used: the journal cannot be read (%s)", self.directory, error)
            return none
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
        # An item may lie in two places: one is enough
        records = records[np.unique(records[:, 1], return_index=True)[1]]
        slot = self.slabs.classes[records[:, 2]]
        within = records[:, 0] % self.slabs.slab
        records = records[(within % slot == 0) & (within // slot < self.slabs.slots[records[:, 2]])]
        return records[:, 0], records[:, 1], records[:, 2]

    def _compact(self) -> None:
        """Rewrite the journal if it has become much longer than necessary."""
        address, item, kind = self.slabs.contents()
        if self._journal.tell() < self._slack * self._patience + _RECORDS * _RECORD * len(address):
            return
        new = self._path(f"journal.{secrets.token_hex(8)}.new")
        try:
            file = open(open_private(new, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b", buffering=0)  # noqa: SIM115
        except OSError:  # for example, the folder was deleted
            self._patience *= 2
            return
        try:
            data = np.stack([address, item, kind], axis=1).tobytes()
            if file.write(data) != len(data):
                raise OSError("short write")
            os.replace(new, self._path("journal"))
        except OSError:  # a full disk: keep the old journal, which is longer but says the same
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(new)
            self._patience *= 2
            return
        self._journal.close()
        self._journal = file

    def close(self) -> None:
        self.flush()
        self._journal.close()
        os.close(self._file)
        os.close(self._lock)


def _locked(directory: str) -> int:
    """Lock the folder; returns the file descriptor that holds the lock. A process that was just killed may hold it for a
    moment, so this waits for it. Raises DataError if it is still held after that."""
    lock, until = open_private(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT), None
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            until = until or time.monotonic() + _LEAVING
            if time.monotonic() > until:
                os.close(lock)
                raise DataError(
                    f"cache: {directory} is in use by another process; each loader needs its own folder, and each run its "
                    "own data.cache.dir"
                ) from None
            time.sleep(0.05)


def known_geometry(directory: str, fingerprint: str) -> dict[str, Any] | None:
    """How items lie in a folder (`capacity`, `slab`, `classes`); None if it has none with this fingerprint."""
    try:
        with read_private(os.path.join(directory, "geometry.json")) as file:
            found = json.load(file)
        if (found["version"], found["fingerprint"]) != (_VERSION, fingerprint):
            return None
        sizes = [*found["classes"], found["slab"]]
        sound = all(type(n) is int for n in [*sizes, found["capacity"]]) and sizes[0] > 0 and sizes[-2] == sizes[-1]
        return found if sound and sizes[:-1] == sorted(set(sizes[:-1])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class InheritedTier:
    """The disk tier of an earlier loader, for reading only. The node has fewer loaders now."""

    def __init__(self, tier: DiskTier) -> None:
        address, item, _ = tier.slabs.contents()
        order = np.argsort(item)
        self._tier, self._item, self._address = tier, item[order], address[order]

    @classmethod
    def open(cls, directory: str, fingerprint: str) -> InheritedTier | None:
        """Open a folder; None if it holds nothing with this fingerprint, or if another process uses it."""
        found = known_geometry(directory, fingerprint) if is_private(directory) else None
        if found is None:
            return None
        try:
            return cls(
                DiskTier(found["capacity"], found["slab"], np.array(found["classes"], np.int64), directory, fingerprint)
            )
        except (DataError, OSError) as error:
            log.warning("cache: the data that an earlier loader left in %s is not used: %s", directory, error)
            return None

    def read(self, item: int, size: int) -> memoryview | None:
        """The item's `size` bytes; None if they are not here, or not what was written."""
        place = int(np.searchsorted(self._item, item))
        if place == len(self._item) or self._item[place] != item:
            return None
        return self._tier.read(int(self._address[place]), item, size)


def _check(item: int, data: Buffer) -> int:
    return crc32c(data, crc32c(item.to_bytes(8, "little")))
