"""The interface that every source format implements (`Converter`), and the registry of known converters."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

from tiphys.dataio.convert.infer import infer_task
from tiphys.dataio.convert.names import AmbiguousNames, FieldNames
from tiphys.dataio.convert.source import Source, SourceUnavailable, is_failure
from tiphys.dataio.episode import DataError, Episode, TaskSpec

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")
_PACKED = (*_ARCHIVES, ".gz", ".bz2", ".xz", ".zst")
ENTRY_POINTS = "tiphys.converters"
_UNPACK = "unpack it, and convert the folder that it holds"
_MAX_NAME = 300  # characters
_MAX_LEFT_OUT = 1000  # names that are listed as left out; a hostile source could have any number

# name -> module:class
BUILT_IN = {
    "lerobot": "tiphys.dataio.convert.lerobot:LeRobot",
    "rlds": "tiphys.dataio.convert.rlds:Rlds",
    "minari": "tiphys.dataio.convert.minari:Minari",
    "d4rl": "tiphys.dataio.convert.d4rl:D4rl",
    "webdataset": "tiphys.dataio.convert.imagetext:ImageText",
    "text": "tiphys.dataio.convert.text:Text",
    "robomimic": "tiphys.dataio.convert.robomimic:Robomimic",
    "zarr": "tiphys.dataio.convert.zarr:Zarr",
    "dqn-replay": "tiphys.dataio.convert.dqn_replay:DqnReplay",
    "vpt": "tiphys.dataio.convert.vpt:Vpt",
    "npz": "tiphys.dataio.convert.npz:Npz",
}


@dataclass(frozen=True)
class Piece:
    """A part of a source that can be read on its own: some files, or a range of one file.

    name  unique in the source, made of [a-z0-9-]; does not depend on the number of converting processes
    data  JSON values that only the converter reads
    """

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadEpisode:
    """An episode that could not be read: its place and the reason. The items after it in the piece are still read."""

    where: str
    reason: str

    def __str__(self) -> str:
        """The reason. The place comes before it unless the reason already begins with the file."""
        return self.reason if self.reason.startswith(self.where.partition(",")[0]) else f"{self.where}: {self.reason}"


Item = Episode | BadEpisode


class Converter(ABC):
    """Reads one format. Each process creates its own, from the source and the options of the mapping file.

    All methods run in a reader process (`tiphys.dataio.convert.process`). If that process crashes, hangs or exceeds its
    memory limit, the process that started it gets a DataError or, while reading episodes, a BadEpisode.
    """

    name: ClassVar[str]
    archives: ClassVar[tuple[str, ...]] = ()  # suffixes of the archives that this converter reads by itself
    options_known: ClassVar[frozenset[str]] = frozenset()
    dropped: frozenset[str] = frozenset()  # fields that the mapping file drops; `episodes` may leave them out, unread

    kept: frozenset[str] = frozenset()  # fields whose videos are copied: `episodes` gives a KeptVideo for each of them

    def __init__(self, source: Source, options: Mapping[str, Any] | None = None):
        self.source = source
        self.options = dict(options or {})
        self.dropped: frozenset[str] = frozenset()  # fields that the mapping file drops; they need not be decoded
        self.names = FieldNames()  # the reader process replaces it if there is a mapping file
        self.left_out: dict[str, None] = {}  # lines of `leave_out`, in order
        unknown = sorted(set(self.options) - self.options_known)
        if unknown:
            known = ", ".join(sorted(self.options_known)) or "none"
            raise DataError(f"options: {', '.join(unknown)} unknown to format {self.name!r}; known options: {known}")

    @classmethod
    @abstractmethod
    def recognise(cls, source: Source) -> float:
        """Confidence that the source has this format, from 0 (no) to 1 (certain). Reads only names and small headers."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The independent parts, in the order of the source."""

    @abstractmethod
    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        """Yield the piece's episodes in order. Memory must not grow with the size of the piece.

        start: number of items to skip without decoding their contents, which may be damaged.
        """

    def tasks(self) -> list[TaskSpec]:
        """The tasks of all episodes. This default infers them from the first episodes, for formats without metadata."""
        found: dict[str, list[Episode]] = {}
        reason = "the source has none"
        for piece in self.pieces()[:4]:
            for number, item in enumerate(self.episodes(piece)):
                if isinstance(item, Episode):
                    found.setdefault(item.task, []).append(item)
                else:
                    reason = str(item)
                if number >= 3:
                    break
        if not found:
            raise DataError(
                f"{self.source.url}: the fields cannot be inferred, because no episode could be read ({reason})"
            )
        return [infer_task(task, episodes) for task, episodes in found.items()]

    def notes(self) -> list[str]:
        """Remarks for the user on how the source was interpreted (a split without files, a field left out)."""
        return []

    def leave_out(self, name: str, reason: str) -> None:
        """Record that `name` in the source (an array, a text, a group, a file) is not converted. The summary lists it once.

        Call it at any time, also while episodes are read. Neither argument should name an episode, because one line for
        each episode helps nobody.
        """
        if len(self.left_out) < _MAX_LEFT_OUT:
            self.left_out[f"left out: {name[:_MAX_NAME]} ({reason[:_MAX_NAME]})"] = None
        else:
            self.left_out["left out: more names, which are not listed"] = None

    def check_archives(self, pieces: Iterable[Piece]) -> None:
        """List the archives that no piece reads as left out. Their episodes would be missed otherwise."""
        read = {f for p in pieces for f in p.data.get("files", ())}
        for path in self.source.files:
            if path.endswith(_ARCHIVES) and path not in read and not path.endswith(self.archives):
                self.leave_out(path, f"an archive; {_UNPACK}")

    def refuse_archive(self) -> None:
        """Raises DataError if the source is one packed file, and not of this format."""
        path = self.source.single
        if path.endswith(_PACKED) and not path.endswith(self.archives) and not self.recognise(self.source):
            raise DataError(
                f"{self.source.url}: is an archive, which the format {self.name!r} does not read; {_UNPACK}"
            )

    def versions(self, piece: Piece) -> list[str]:
        """Versions of the piece's files, so that a source that changed between two runs is noticed."""
        names = piece.data.get("files", ())
        return [self.source.version(n) for n in names if self.source.exists(n)]


def group_files(source: Source, files: Iterable[str], piece_bytes: int) -> list[Piece]:
    """Pieces of consecutive files, about `piece_bytes` each."""
    groups: list[list[str]] = []
    size = 0
    for path in files:
        file_bytes = source.size(path)
        if not groups or size + file_bytes > piece_bytes:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += file_bytes
    return [Piece(f"{i:06d}", {"files": g}) for i, g in enumerate(groups)]


def whole_number(options: Mapping[str, Any], name: str) -> int:
    """An option that counts something; 0 if it is not given. Raises DataError if it is not a whole number of at least 1."""
    value = options.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"options: {name} {value!r} must be a whole number of at least 1")
    return value


def cut(bounds: Sequence[int], max_steps: int) -> list[int]:
    """The rows at which episodes begin, and the end of the last, such that none is longer than `max_steps`; 0: no limit."""
    if not max_steps:
        return list(bounds)
    return [b for first, end in pairwise(bounds) for b in range(first, end, max_steps)] + list(bounds[-1:])


T = TypeVar("T")


def read_each(
    keys: Iterable[T], read: Callable[[T], Episode], where: Callable[[T], str], start: int = 0
) -> Iterator[Item]:
    """`read(key)` for each key, or a BadEpisode if it fails. For sources in which each episode can be read on its own."""
    for number, key in enumerate(keys):
        if number >= start:
            yield attempt(partial(read, key), where(key))


def attempt(read: Callable[[], T], where: str) -> T | BadEpisode:
    """The result of `read()`, or a BadEpisode with the reason.

    A failing store or disk, a missing package or unclear names are not a fault of the episode and are raised.
    """
    try:
        return read()
    except (SourceUnavailable, ImportError, AmbiguousNames):
        raise
    except (DataError, FileNotFoundError) as error:
        return BadEpisode(where, str(error))
    except OSError as error:
        if is_failure(error.errno):
            raise SourceUnavailable(f"{where}: {error}") from error
        return BadEpisode(where, f"{type(error).__name__}: {error}")
    except MemoryError:
        return BadEpisode(where, "reading it needs more memory than a reader process may use")
    except Exception as error:  # damaged bytes make libraries raise anything
        return BadEpisode(where, f"{type(error).__name__}: {error}")


def converters() -> dict[str, str]:
    """name -> module:class of every converter, built in or from an entry point. Raises DataError if two share a name."""
    found = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINTS):
        if found.setdefault(point.name, point.value) != point.value:
            raise DataError(
                f"converter {point.name!r} of {point.value}: the name is taken by {found[point.name]}; rename it"
            )
    return found


def load_converter(target: str) -> type[Converter]:
    """Import the class that `module:class` names."""
    module, _, name = target.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"converter {target}: {error}. Built-in converters need: pip install 'tiphys[convert]'"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Converter)):
        raise TypeError(f"converter {target} is not a subclass of tiphys.dataio.convert.converter.Converter")
    return loaded


def recognise(source: Source, known: Mapping[str, str]) -> str:
    """The name of the source's format. Raises DataError if no format fits, or if several fit equally well."""
    scores: dict[str, float] = {}
    for name, target in known.items():
        try:
            scores[name] = load_converter(target).recognise(source)
        except (DataError, FileNotFoundError):
            scores[name] = 0.0
    best = max(scores.values(), default=0.0)
    names = [name for name, score in scores.items() if score == best]
    if best <= 0:
        raise DataError(
            f"{source.url}: has none of the known formats ({', '.join(known)}); {_advice(source)}name the format with --from"
        )
    if len(names) > 1:
        raise DataError(f"{source.url}: could be {' or '.join(names)}; name the format with --from")
    return names[0]


_NOT_READ = {
    _PACKED: _UNPACK,
    (".pkl", ".pickle", ".pt", ".pth"): "pickles can run code and are never loaded; save the arrays as .npz or HDF5",
    (".parquet", ".arrow", ".feather"): "tables are read only as LeRobot or Minari datasets, or with a column of texts",
    (".csv", ".mat", ".npy", ".bag", ".mcap"): "write the episodes as .npz files",
}


def _advice(source: Source) -> str:
    """What to do with files of a kind that no converter reads; empty if there is none."""
    for suffixes, advice in _NOT_READ.items():
        found = [p for p in source.files if p.lower().endswith(suffixes)]
        if found:
            more = f" and {len(found) - 1:,} more like it" if len(found) > 1 else ""
            return f"it holds {found[0]}{more}: {advice}. Or "
    return ""
