"""Reads damaged inputs in a process of its own, and counts what happens."""

from __future__ import annotations

import multiprocessing as mp
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from tests.fuzz.readers import Reader, make

HANG = 30.0  # seconds of CPU time for one input
STUCK = 600.0  # seconds for one input, on a machine that others use too
START = 60.0  # seconds of CPU time to import the reader


def attempt(
    name: str, number: int, readers: Mapping[str, Callable[[], Reader]], folder: Path, made: dict[str, Reader]
) -> str:
    """`read`, `refused`, or the traceback of an error that is not one of ours."""
    reader = made.get(name)
    if reader is None:
        reader = made[name] = readers[name]()
    rng = random.Random(f"{name} {number}")
    data = reader.damage(rng.choice(reader.seeds), rng)
    empty = folder / "input"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    try:
        reader.read(data, empty)
    except reader.errors:
        return "refused"
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    return "read"


def _work(name: str, start: int, stop: int, answers: Connection) -> None:
    with tempfile.TemporaryDirectory(prefix="tiphys-fuzz-") as scratch:
        readers, made = make(Path(scratch)), dict[str, Reader]()
        for number in range(start, stop):
            answers.send((number, attempt(name, number, readers, Path(scratch), made), _peak()))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _answers(pipe: Connection, pid: int | None, most: float) -> bool:
    """Whether the process answers before it has used so many seconds of CPU time."""
    began, used = time.monotonic(), None
    while not pipe.poll(1.0):
        try:
            now = sum(psutil.Process(pid).cpu_times()[:2])
        except psutil.NoSuchProcess:  # then `recv` says so
            return True
        used = now if used is None else used
        if now - used > most or time.monotonic() - began > STUCK:
            return False
    return True


def fuzz(name: str, inputs: int, start: int = 0) -> tuple[Counter[str], list[str], int]:
    """Counts, reports of the first errors, and bytes of memory at the peak."""
    counts, reports, peak = Counter[str](), list[str](), 0
    context, number, stop = mp.get_context("spawn"), start, start + inputs
    while number < stop:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, number, stop, theirs))
        process.start()
        theirs.close()
        begun = False
        try:
            while number < stop:
                if not _answers(mine, process.pid, HANG if begun else HANG + START):
                    counts["hang"] += 1
                    reports.append(f"{name} {number}: no end within {HANG:.0f} s of CPU time")
                    number += 1
                    break
                number, outcome, peak = mine.recv()
                begun = True
                number += 1
                known = outcome in ("read", "refused")
                counts[outcome if known else "other error"] += 1
                if not known and len(reports) < 20:
                    reports.append(f"{name} {number - 1}: {outcome}")
        except EOFError:
            counts["crash"] += 1
            reports.append(f"{name} {number}: the process died")
            number += 1
        finally:
            process.kill()
            process.join()
    return counts, reports, peak
