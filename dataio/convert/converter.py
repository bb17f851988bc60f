"""Converter: what a source format must say of itself, and the registry of those that are known."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

from tiphys.dataio.convert.infer import infer_task
from tiphys.dataio.convert.source import Source, SourceUnavailable
from tiphys.dataio.episode import DataError, Episode, TaskSpec

ENTRY_POINTS = "tiphys.converters"

# name -> module:class. The order is that of recognition among equals.
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
    """A part of a source that can be read alone: some files, or a range of one. `data` is JSON, for the converter only.

    `name` is unique in the source, made of [a-z0-9-], and does not depend on how many processes convert.
    """

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadEpisode:
    """An episode that could not be read: where it lies and why. What follows it in the piece could be read."""

    where: str
    reason: str

    def __str__(self) -> str:
        """The reason, which mostly names the file itself; else with where it lies before it."""
        return self.reason if self.reason.startswith(self.where.partition(",")[0]) else f"{self.where}: {self.reason}"


Item = Episode | BadEpisode


class Converter(ABC):
    """Reads one format. Made anew in each process, from the source and the options of the mapping file.

    All methods run in a reader process (`tiphys.dataio.convert.process`): a crash, a hang or too much memory there is a
    DataError here.
    """

    name: ClassVar[str]
    options_known: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, source: Source, options: Mapping[str, Any] | None = None):
        self.source = source
        self.options = dict(options or {})
        unknown = sorted(set(self.options) - self.options_known)
        if unknown:
            known = ", ".join(sorted(self.options_known)) or "none"
            raise DataError(f"options: {', '.join(unknown)} unknown to format {self.name!r}, which takes {known}")

    @classmethod
    @abstractmethod
    def recognise(cls, source: Source) -> float:
        """How sure it is that the source has this format: 0 no, 1 certain. Reads names and small headers only."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """Independent parts, in the order of the source."""

    @abstractmethod
    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        """The piece's episodes in order, in memory that does not grow with the piece.

        start: number of items to pass over without reading what may be broken in them.
        """

    def tasks(self) -> list[TaskSpec]:
        """The tasks of all episodes; here inferred from the first readable ones, for formats without metadata."""
        found: dict[str, list[Episode]] = {}
        reason = "it has no episodes"
        for piece in self.pieces()[:4]:
            for number, item in enumerate(self.episodes(piece)):
                if isinstance(item, Episode):
                    found.setdefault(item.task, []).append(item)
                else:
                    reason = str(item)
                if number >= 3:
                    break
        if not found:
            raise DataError(f"{self.source.url}: no episode could be read to infer the fields from; {reason}")
        return [infer_task(task, episodes) for task, episodes in found.items()]

    def notes(self) -> list[str]:
        """What the user should know of how the source was understood (a split without files, a field left out)."""
        return []

    def versions(self, piece: Piece) -> list[str]:
        """What changes when the piece's files do, to notice a source that changed between two runs."""
        names = piece.data.get("files", ())
        return [self.source.version(n) for n in names if self.source.exists(n)]


def group_files(source: Source, files: Iterable[str], most: int) -> list[Piece]:
    """Pieces of consecutive files, of about `most` bytes each."""
    groups: list[list[str]] = []
    size = 0
    for path in files:
        here = source.size(path)
        if not groups or size + here > most:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += here
    return [Piece(f"{i:06d}", {"files": g}) for i, g in enumerate(groups)]


T = TypeVar("T")


def read_each(
    keys: Iterable[T], read: Callable[[T], Episode], where: Callable[[T], str], start: int = 0
) -> Iterator[Item]:
    """`read` for each key; what it cannot read becomes a BadEpisode. For sources whose episodes lie side by side."""
    for number, key in enumerate(keys):
        if number >= start:
            yield attempt(partial(read, key), where(key))


def attempt(read: Callable[[], T], where: str) -> T | BadEpisode:
    """What `read` gives, or why there is none. A failing store, a missing package, no memory are no fault of the episode."""
    try:
        return read()
    except (SourceUnavailable, ImportError):
        raise
    except (DataError, FileNotFoundError) as error:
        return BadEpisode(where, str(error))
    except MemoryError:
        return BadEpisode(where, "reading it needs more memory than a reader may take")
    except Exception as error:  # a library met bytes that it did not foresee
        return BadEpisode(where, f"{type(error).__name__}: {error}")


def converters() -> dict[str, str]:
    """name -> module:class of every converter, built in or of an entry point (which may not take a built-in's name)."""
    found = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINTS):
        if found.setdefault(point.name, point.value) != point.value:
            raise DataError(f"converter {point.name!r} of {point.value} has the name of {found[point.name]}; rename it")
    return found


def load_converter(target: str) -> type[Converter]:
    """The class at module:class."""
    module, _, name = target.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"converter {target}: {error}. For a built-in one: pip install 'tiphys[convert]'") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Converter)):
        raise TypeError(f"converter {target} is not a subclass of tiphys.dataio.convert.converter.Converter")
    return loaded


def recognise(source: Source, known: Mapping[str, str]) -> str:
    """The name of the format. DataError, with what was looked for, where none or several fit equally."""
    scores: dict[str, float] = {}
    for name, target in known.items():
        try:
            scores[name] = load_converter(target).recognise(source)
        except (DataError, FileNotFoundError):
            scores[name] = 0.0
    best = max(scores.values(), default=0.0)
    names = [name for name, score in scores.items() if score == best]
    if best <= 0:
        raise DataError(f"{source.url}: none of the known formats ({', '.join(known)}); name one with --from")
    if len(names) > 1:
        raise DataError(f"{source.url}: could be {' or '.join(names)}; name one with --from")
    return names[0]
