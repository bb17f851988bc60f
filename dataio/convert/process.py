"""The reader process: all parsers of untrusted data (HDF5, FFmpeg, Parquet, …) run in a child process that may crash.

If the child crashes, hangs or needs more memory than allowed, the parent raises a DataError that names the source. One
child reads many pieces, one after another. If it has died, the next request starts a new one.

    python -m tiphys.dataio.convert.process DESCRIPTOR MEMORY PARENT

The child reads requests (a line of JSON each) from standard input and writes its answers to the file descriptor
DESCRIPTOR. MEMORY is its limit in bytes, PARENT the process id of the parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, BinaryIO

from tiphys.dataio.convert import wire
from tiphys.dataio.convert.converter import BadEpisode, Converter, Item, Piece, attempt, load_converter, recognise
from tiphys.dataio.convert.limits import JSON_BYTES
from tiphys.dataio.convert.names import AmbiguousNames, FieldNames
from tiphys.dataio.convert.source import Source, SourceUnavailable
from tiphys.dataio.episode import DataError, Episode, TaskSpec
from tiphys.dataio.python_path import child_environment, python

MEMORY = 8 << 30  # private memory of a reader process, in bytes
TIMEOUT = 600.0  # seconds without an answer after which a reader process is stopped

_HEADER = struct.Struct("<cQ")  # kind of answer, bytes that follow (0 for an episode, which holds its own size)
_EPISODE, _BAD, _NOTES, _RESULT, _END, _ERROR = b"E", b"B", b"N", b"R", b".", b"!"
_ERRORS: dict[str, type[Exception]] = {
    "AmbiguousNames": AmbiguousNames,
    "DataError": DataError,
    "SourceUnavailable": SourceUnavailable,
    "ImportError": ImportError,
    "FileNotFoundError": DataError,
}


class ReaderDied(DataError):
    """The reader process crashed or gave no answer while it read this data."""


@dataclass(frozen=True)
class Plan:
    """The pieces of a source, its tasks, notes for the user, and the file versions of each piece.

    names  name in the source -> (its usual field, its field; None if a mapping file drops it)
    """

    pieces: list[Piece]
    tasks: list[TaskSpec]
    notes: list[str]
    versions: list[list[str]]
    names: dict[str, tuple[str, str | None]]


class Reader:
    """Reads one source in one format in a child process. Context manager."""

    def __init__(
        self,
        source: str,
        target: str,
        options: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        *,
        dropped: Sequence[str] = (),
        kept: Sequence[str] = (),
        memory: int = MEMORY,
        timeout: float = TIMEOUT,
    ):
        self._source = source
        self._job: dict[str, Any] = {
            "source": source,
            "target": target,
            "options": dict(options or {}),
            "fields": dict(fields or {}),
            "dropped": list(dropped),
            "kept": list(kept),
        }
        self.notes: dict[str, None] = {}  # what the converter left out while it read the current piece, in order
        self._memory, self._timeout = memory, timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._answers = -1  # file descriptor of the pipe
        self._errors: Any = None  # temporary file with the standard error of the child

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def recognise(self, known: Mapping[str, str]) -> str:
        """The name of the source's format, one of `known` (name -> module:class). Later calls read this format."""
        name = str(self._request_one("recognise", known=dict(known)))
        self._job["target"] = known[name]
        return name

    def plan(self) -> Plan:
        """What a conversion needs to know before it reads all episodes."""
        answer = self._request_one("plan")
        return Plan(
            pieces=[Piece(**p) for p in answer["pieces"]],
            tasks=[TaskSpec(**t) for t in answer["tasks"]],
            notes=list(answer["notes"]),
            versions=list(answer["versions"]),
            names={str(k): (str(usual), field) for k, (usual, field) in answer["names"].items()},
        )

    def episodes(self, piece: Piece) -> Iterator[Item]:
        """The items of the piece. If the child dies, that item is a BadEpisode, and a new child continues after it.

        Raises DataError if three children die one after another.
        """
        done, deaths = 0, 0
        self.notes = {}
        while True:
            try:
                for item in self._request("episodes", piece=asdict(piece), start=done):
                    done += 1
                    deaths = 0
                    yield item
                return
            except ReaderDied as error:
                deaths += 1
                yield BadEpisode(f"{self._source}, piece {piece.name}, item {done}", str(error))
                done += 1
                if deaths == 3:  # then the file itself is at fault, not one episode
                    raise DataError(
                        f"{self._source}, piece {piece.name}: {error}; this happened three times in a row"
                    ) from None

    def parse_file(self, operation: str, file: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Run an operation of the target, `format.limited:execute`, on a file of a dataset."""
        return dict(self._request_one("file", parse=operation, file=file, arguments=dict(arguments)))

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            assert self._child.stdin is not None
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            os.close(self._answers)
            self._errors.close()
            self._child = None

    def _request_one(self, operation: str, **arguments: Any) -> Any:
        (answer,) = self._request(operation, **arguments)
        return answer

    def _start(self) -> None:
        read, write = os.pipe()
        with contextlib.suppress(OSError, ImportError, AttributeError):  # a larger pipe is faster, but not necessary
            import fcntl

            fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 1 << 20)  # type: ignore[attr-defined]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        path = os.pathsep.join(p for p in sys.path if p)
        environment = {**child_environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment["HDF5_PLUGIN_PRELOAD"] = "::"  # a file must not make HDF5 load a filter from a shared library
        self._child = subprocess.Popen(
            python("-m", "tiphys.dataio.convert.process", str(write), str(self._memory), str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[write],
            env=environment,
        )
        os.close(write)
        self._answers = read

    def _request(self, operation: str, **arguments: Any) -> Iterator[Any]:
        """The answers to one request. If the caller does not read them all, the child is stopped."""
        if self._child is None:
            self._start()
        assert self._child is not None
        assert self._child.stdin is not None
        finished = False
        try:
            with contextlib.suppress(BrokenPipeError):  # then the child is dead, and the read below raises the reason
                self._child.stdin.write(json.dumps({**self._job, "operation": operation, **arguments}).encode() + b"\n")
                self._child.stdin.flush()
            while True:
                header = bytearray(_HEADER.size)
                self._read_into(memoryview(header))
                kind, size = _HEADER.unpack(header)
                if kind == _EPISODE:
                    yield wire.load(self._read_into, self._source)
                    continue
                if size > JSON_BYTES * 4:
                    raise ReaderDied(
                        f"{self._source}: the reader process sent {size:,} bytes of metadata; the limit is {JSON_BYTES * 4:,}"
                    )
                body = bytearray(size)
                self._read_into(memoryview(body))
                value: Any = json.loads(bytes(body)) if size else None
                if kind == _NOTES:
                    self.notes.update(dict.fromkeys(value))
                    continue
                if kind == _END:
                    finished = True
                    return
                if kind == _ERROR:
                    finished = True
                    raise _ERRORS.get(value["type"], DataError)(value["message"])
                yield BadEpisode(**value) if kind == _BAD else value
        finally:
            if not finished:
                self.close()

    def _read_into(self, view: memoryview) -> None:
        """Fill the view. Raises ReaderDied if the child has ended, or sends nothing for `timeout` seconds."""
        end = time.monotonic() + self._timeout
        poll = select.poll()
        poll.register(self._answers, select.POLLIN | select.POLLHUP)
        while len(view):
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(max(1, int(left * 1000))):
                self.close()
                raise ReaderDied(f"{self._source}: the reader process gave no answer for {self._timeout:.0f} s")
            count = os.readv(self._answers, [view])
            if count == 0:
                raise ReaderDied(f"{self._source}: {self._exit_reason()}")
            view = view[count:]
            end = time.monotonic() + self._timeout

    def _exit_reason(self) -> str:
        """How the child ended, and the last line that it wrote to standard error."""
        assert self._child is not None
        code = self._child.wait()
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"the reader process {how}" + (f" ({lines[-1].strip()})" if lines else "")


# ---- the child -------------------------------------------------------------------------------------------------------


def _answer(request: dict[str, Any], out: BinaryIO) -> None:
    if request["operation"] == "file":
        execute: Any = pkgutil.resolve_name(request["target"])
        _send(out, _RESULT, execute(request["parse"], request["file"], request["arguments"]))
        return
    source = Source(request["source"])
    try:
        _execute(request, source, out)
    except Exception as error:
        if source.failed:  # a library may have replaced the SourceUnavailable by an error of its own
            raise SourceUnavailable(source.failed) from error
        raise


def _execute(request: dict[str, Any], source: Source, out: BinaryIO) -> None:
    if request["operation"] == "recognise":
        _send(out, _RESULT, recognise(source, request["known"]))
        return
    converter: Converter = load_converter(request["target"])(source, request["options"])
    converter.dropped = frozenset(request.get("dropped", ()))
    converter.kept = frozenset(request.get("kept", ()))
    converter.names = FieldNames(request["fields"])
    if request["operation"] == "plan":
        converter.refuse_archive()  # before a parser of another format sees its bytes
        pieces, tasks = converter.pieces(), converter.tasks()
        converter.check_archives(pieces)
        plan = {
            "pieces": [asdict(p) for p in pieces],
            "tasks": [converter.names.with_roles(t).to_dict() for t in tasks],
            "notes": [*converter.notes(), *converter.left_out],
            "versions": [converter.versions(p) for p in pieces],
            "names": converter.names.seen,
        }
        _send(out, _RESULT, plan)
        return
    _send_episodes(converter, source, Piece(**request["piece"]), request["start"], out)
    _send(out, _NOTES, list(converter.left_out))


def _send_episodes(converter: Converter, source: Source, piece: Piece, start: int, out: BinaryIO) -> None:
    for item in converter.episodes(piece, start):
        if source.failed:  # a library may have hidden the error and gone on with half of the bytes
            raise SourceUnavailable(source.failed)
        if isinstance(item, Episode):
            sent = attempt(partial(_send_episode, out, item), f"{source.url}, episode {item.id}")
            if isinstance(sent, Episode):
                continue
            item = sent
        _send(out, _BAD, asdict(item))


def _send_episode(out: BinaryIO, episode: Episode) -> Episode:
    parts = wire.dump(episode)  # everything that can fail comes before the first byte is sent
    out.write(_HEADER.pack(_EPISODE, 0))
    for part in parts:
        out.write(part)
    out.flush()  # otherwise a crash at the next episode would lose this one
    return episode


def _send(out: BinaryIO, kind: bytes, value: Any = None) -> None:
    body = b"" if value is None else json.dumps(value).encode()
    out.write(_HEADER.pack(kind, len(body)) + body)
    out.flush()


def die_with_parent(parent: int) -> None:
    """Start a thread that ends this process as soon as its parent has ended, even during a call that never returns."""

    def watch() -> None:
        while os.getppid() == parent:  # false from the start if the parent has already ended
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(descriptor: int, memory: int, parent: int) -> None:
    """The child: answer requests until standard input is closed."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    die_with_parent(parent)
    with open(descriptor, "wb", buffering=1 << 16) as out:
        for line in sys.stdin.buffer:
            try:
                _answer(json.loads(line), out)
                _send(out, _END)
            except BrokenPipeError:
                return
            except MemoryError:
                text = f"reading it needs more than the {memory >> 20:,} MiB that a reader may use"
                _send(out, _ERROR, {"type": "DataError", "message": f"{json.loads(line)['source']}: {text}"})
            except Exception as error:
                _send(out, _ERROR, _error_answer(error, json.loads(line)["source"]))


def _error_answer(error: Exception, source: str) -> dict[str, str]:
    for name, known in _ERRORS.items():
        if type(error).__name__ == name or (name in ("SourceUnavailable", "ImportError") and isinstance(error, known)):
            return {"type": name, "message": str(error)}
    if isinstance(error, DataError):
        return {"type": "DataError", "message": str(error)}
    frame = traceback.extract_tb(error.__traceback__)[-1]  # the place, for a bug report
    at = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return {"type": "DataError", "message": f"{source}: {type(error).__name__}: {error} (at {at})"}


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:4]))
