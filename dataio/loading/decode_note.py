"""What a loader process is decoding, in shared memory: if a decoder ends the process, its parent knows by which episode.

Decoders of video are written in C and read bytes that others made. One that crashes takes its process with it, and would do so
again whenever the episode is drawn.
"""

from __future__ import annotations

import json
import mmap
import signal
from typing import NamedTuple

SIZE = 1 << 16  # bytes of the note's place: a whole number of pages
CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP})


class Decoding(NamedTuple):
    """An episode that is being decoded: the fingerprint of its dataset, its number there, and the place of its bytes."""

    dataset: str
    episode: int
    place: str


class DecodeNote:
    """The place of the note: `SIZE` bytes of a shared file from `offset` on."""

    def __init__(self, fd: int, offset: int) -> None:
        self._map = mmap.mmap(fd, SIZE, offset=offset)

    def write(self, decoding: Decoding) -> None:
        text = json.dumps(decoding).encode()[: SIZE - 4]
        self._map[4 : 4 + len(text)] = text
        self._map[:4] = len(text).to_bytes(4, "little")

    def clear(self) -> None:
        self._map[:4] = bytes(4)

    def read(self) -> Decoding | None:
        """What was being decoded; None if nothing was."""
        size = min(int.from_bytes(self._map[:4], "little"), SIZE - 4)
        try:
            dataset, episode, place = json.loads(self._map[4 : 4 + size])
            return Decoding(str(dataset), int(episode), str(place))
        except (ValueError, TypeError):
            return None

    def close(self) -> None:
        self._map.close()
