"""Files of a dataset that are not trusted: index.parquet, statistics.parquet and tars are parsed in a reader process with limits.

A few kilobytes of Parquet can claim to hold terabytes, and only the decoder finds out. So it runs where running out of memory
hurts nobody. A table that was decoded there within the limits may then be read in this process too.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.format import arrays, table, tar
from tiphys.dataio.statistics import Statistics

_MEMORY, _FOR_EACH_BYTE, _MOST = (
    1 << 30,
    64,
    8 << 30,
)  # bytes that may be used: always, for each byte of the file, at most
_TIMEOUT = 600.0  # seconds
_IDLE = 20.0  # seconds after which the reader process is stopped


def decode(file: Path, out: Path, tasks: Sequence[str], shards: Sequence[str], where: str) -> dict[str, np.ndarray]:
    """`arrays.decode` to the folder `out`, in the reader process. Errors name the file `where`.

    Raises DataError if the file is damaged or needs too much memory, and OSError if the disk fails.
    """
    _call("decode", where, file, out=str(out), tasks=list(tasks), shards=list(shards))
    return arrays.load(out)


def check_table(file: Path, where: str) -> None:
    """Decode every row of an index file in the reader process, and keep nothing. Raises DataError if that fails."""
    _call("table", where, file)


def read_statistics(file: Path, where: str) -> Statistics:
    """`Statistics.read`, after the file was read in the reader process. Raises DataError if that fails."""
    _call("statistics", where, file)
    return Statistics.read(file)


def samples(file: Path) -> Iterator[tar.Sample]:
    """`tar.samples`, parsed in the reader process. Raises DataError after the last sample before a fault, and if parsing needs
    too much memory or time."""
    size = file.stat().st_size
    with tempfile.TemporaryDirectory(prefix="tiphys-tar-") as folder:
        listing = Path(folder) / "samples"
        _call("samples", "", file, out=str(listing))
        with open(listing, encoding="ascii") as lines:
            for line in lines:
                found = json.loads(line)
                if isinstance(found, str):
                    raise DataError(found)
                key, members, begin, end = found
                own = {extension: tar.Member(*one) for extension, one in members.items()}
                if not all(0 <= m.header <= m.offset <= m.offset + m.size <= size for m in own.values()):
                    raise DataError(f"byte {begin}: the sample {key!r} does not lie within the tar")
                yield tar.Sample(key, own, begin, end)


def _decode(file: Path, out: str, tasks: list[str], shards: list[str]) -> None:
    arrays.decode(file, Path(out), tasks, shards)


def _table(file: Path) -> None:
    import pyarrow.parquet as pq

    table.read_tasks_and_shards(file)
    table.check_schema(pq.read_schema(file))
    for _ in table.batches(table.Part(file)):
        pass


def _statistics(file: Path) -> None:
    for sketch in Statistics.read(file).sketches.values():
        sketch.check()


def _samples(file: Path, out: str) -> None:
    """One line of JSON for each sample, and one with what is wrong with the tar if it is damaged."""
    with open(out, "w", encoding="ascii") as lines:
        try:
            for sample in tar.samples(file):
                lines.write(json.dumps([sample.key, sample.members, sample.begin, sample.end]) + "\n")
        except DataError as error:
            lines.write(json.dumps(str(error)) + "\n")


_OPERATIONS: dict[str, Callable[..., None]] = {
    "decode": _decode,
    "table": _table,
    "statistics": _statistics,
    "samples": _samples,
}


def execute(operation: str, file: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """In the reader process: run one operation within the memory that a file of this size may need."""
    import pyarrow as pa

    _limit_memory(min(_MOST, _MEMORY + _FOR_EACH_BYTE * os.path.getsize(file)))
    pa.set_cpu_count(1)  # each thread has an arena of its own, which counts as memory
    try:
        _OPERATIONS[operation](Path(file), **arguments)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            return {"errno": error.errno, "text": error.strerror or str(error)}
        return {"wrong": str(error) or type(error).__name__}
    finally:
        pa.default_memory_pool().release_unused()
    return {}


def _limit_memory(size: int) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


_lock = threading.Lock()
_reader: Any = None
_timer: threading.Timer | None = None


def _call(operation: str, where: str, file: Path, **arguments: Any) -> None:
    global _reader, _timer
    from tiphys.dataio.convert.process import Reader

    with _lock:
        if _timer is not None:
            _timer.cancel()
        if _reader is None:
            _reader = Reader("", f"{__name__}:execute", memory=_MOST, timeout=_TIMEOUT)
        try:
            answer = _reader.parse_file(operation, str(file), arguments)
        except DataError as error:
            reason = str(error).removeprefix(": ")
            raise DataError(f"{where} cannot be decoded: {reason}" if where else reason) from None
        finally:
            _timer = threading.Timer(_IDLE, _stop)
            _timer.daemon = True
            _timer.start()
    if "errno" in answer:
        raise OSError(answer["errno"], answer["text"], str(file))
    if "wrong" in answer:
        raise DataError(f"{where}: {answer['wrong']}" if where else answer["wrong"])


def _stop() -> None:
    global _reader
    with _lock:
        if _reader is not None:
            _reader.close()
        _reader = None


def _forget() -> None:
    global _reader, _timer, _lock
    _reader, _timer, _lock = None, None, threading.Lock()  # a forked child must not share its parent's reader


os.register_at_fork(after_in_child=_forget)
