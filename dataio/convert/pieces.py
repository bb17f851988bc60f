"""Converts a source to shards, piece by piece, on one machine or on a Ray cluster.

The pieces of a source are independent. Each piece becomes its own shards and its own part of the index; the upload of
that part comes last and commits the piece. If a conversion was killed, run it again: finished pieces are kept,
unfinished ones are written again. At the end the pieces are merged. The bytes of the dataset do not depend on the
number of processes, on their order, or on how often the conversion was killed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from collections.abc import Mapping as Dict
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

from tiphys.dataio.atomic import to_json
from tiphys.dataio.convert.converter import BadEpisode, Piece, converters
from tiphys.dataio.convert.infer import conform
from tiphys.dataio.convert.mapping import Mapping
from tiphys.dataio.convert.names import AmbiguousNames
from tiphys.dataio.convert.process import MEMORY, TIMEOUT, Reader, die_with_parent
from tiphys.dataio.convert.report import REPORT, ConversionReport, check_ranges, outside, outside_notes
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.process_pool import ProcessPool
from tiphys.dataio.shards import ShardWriter, merge_pieces
from tiphys.dataio.storage import Store

PLAN = "pieces/plan.json"
_LATE = "some episodes have it, but not all of those from which the fields were inferred"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to convert one piece, as plain values that can be sent to any process."""

    source: str
    target: str  # module:class of the converter
    destination: str
    tasks: tuple[dict[str, Any], ...]
    mapping: dict[str, Any]
    names: dict[str, tuple[str, str | None]]  # as in `process.Plan`
    encodings: dict[str, dict[str, Any]]
    dropped: tuple[str, ...]  # names of fields in the source
    kept: tuple[str, ...]  # names of fields in the source whose videos are copied
    shard_bytes: int
    skip_bad: bool
    memory: int
    timeout: float
    piece: Piece = field(default_factory=lambda: Piece(""))


P = ParamSpec("P")
R = TypeVar("R")


def _names_its_mapping(work: Callable[P, R]) -> Callable[P, R]:
    """Errors of a mapping name its file, not only the argument `mapping`."""

    @functools.wraps(work)
    def named(*args: P.args, **options: P.kwargs) -> R:
        try:
            return work(*args, **options)
        except DataError as error:
            file = options.get("mapping")
            if isinstance(file, str) and str(error).startswith("mapping: "):
                raise DataError(file + str(error).removeprefix("mapping")) from None
            raise

    return named


@_names_its_mapping
def convert(
    source: str,
    destination: str,
    *,
    format: str | None = None,
    mapping: str | Mapping | Dict[str, Any] | None = None,
    skip_bad: bool = False,
    processes: int = 0,
    on: str = "local",
    progress: Progress | None = None,
    shard_bytes: int = 64 << 20,
    memory: int = MEMORY,
    timeout: float = TIMEOUT,
) -> ConversionReport:
    """Convert a source of any known format into a dataset.

    source       path or URL of a folder or a file
    destination  folder of the dataset, in any store. If it holds an unfinished conversion of the same source with the
                 same settings, that conversion is finished
    format       name of a converter; recognised if not given
    mapping      YAML file, its content as a dict, or a Mapping
    skip_bad     leave out, count and list malformed episodes; otherwise the first one raises DataError
    processes    number of pieces converted at the same time; 0: one for each core
    on           local | ray (the cluster at RAY_ADDRESS, or one started on this machine)
    progress     called with (pieces done, pieces in total)
    shard_bytes  approximate size of a shard
    memory       private memory, in bytes, that a reader process may use
    timeout      seconds without an answer after which a reader process is stopped

    Raises DataError if data is malformed or if two names become one field or two episodes have one id, OSError if the source
    or the destination fails (run it again to go on), FileExistsError if the destination holds a dataset or another conversion,
    ImportError if a package that the format needs is missing.
    """
    known = converters()
    rules = mapping if isinstance(mapping, Mapping) else _load_mapping(mapping)
    if format is not None and format not in known:
        raise DataError(f"unknown format {format!r}; known: {', '.join(known)}")
    if on not in ("local", "ray"):
        raise DataError(f"on={on!r}: must be local or ray")
    target = known.get(format or "", "")
    with Reader(source, target, rules.options, rules.fields, memory=memory, timeout=timeout) as reader:
        format = format or reader.recognise(known)
        plan = reader.plan()
    resolved = rules.resolve(plan.names)
    tasks = resolved.tasks(plan.tasks, plan.names)
    notes = [*plan.notes, *check_ranges(tasks)]
    encodings = resolved.encodings(plan.tasks)
    job = Job(
        source=source,
        target=known[format],
        destination=destination,
        tasks=tuple(t.to_dict() for t in tasks),
        mapping=rules.to_dict(),
        names=plan.names,
        encodings={k: asdict(e) for k, e in encodings.items()},
        dropped=resolved.dropped(plan.tasks),
        kept=_kept(resolved, plan.tasks, format),
        shard_bytes=shard_bytes,
        skip_bad=skip_bad,
        memory=memory,
        timeout=timeout,
    )
    store = Store(destination)
    done = _finished_pieces(store, destination, _plan(job, plan.pieces, plan.versions))
    todo = [p for p in plan.pieces if p.name not in done]
    if progress is not None:
        progress(len(done), len(plan.pieces))
    run_jobs = _run_on_ray if on == "ray" else _run_locally
    jobs = (replace(job, piece=p) for p in todo)
    for number, _ in enumerate(run_jobs(jobs, len(todo), processes), len(done) + 1):
        if progress is not None:
            progress(number, len(plan.pieces))
    return _finish(store, job, format, tasks, plan.pieces, notes)


def convert_piece(job: Job) -> str:
    """Write one piece: its shards, its report, and last its part of the index, which commits the piece.

    Returns the name of the piece.
    """
    rules = Mapping.from_dict(job.mapping).resolve(job.names)
    tasks = {t["name"]: TaskSpec(**t) for t in job.tasks}
    encodings = {k: Encoding(**e) for k, e in job.encodings.items()}
    bad: list[BadEpisode] = []
    beyond: dict[tuple[str, str], tuple[int, int]] = {}
    seen: dict[str, int] = {}  # id -> its number among the piece's readable episodes
    unknown: set[str] = set()  # fields that the task does not have
    episodes = steps = 0

    def reject(item: BadEpisode) -> None:
        if not job.skip_bad:
            raise DataError(f"{item}. Use --skip-bad to leave such episodes out and list them")
        bad.append(item)

    writer = ShardWriter(
        job.destination, list(tasks.values()), piece=job.piece.name, encodings=encodings, shard_bytes=job.shard_bytes
    )
    reader = _reader(job)
    with writer:
        try:
            for item in reader.episodes(job.piece):
                if isinstance(item, BadEpisode):
                    reject(item)
                    continue
                if item.id in seen:
                    raise AmbiguousNames(_same_id(item.id, job.source, job.piece, seen[item.id], job.piece, len(seen)))
                seen[item.id] = len(seen)
                where = f"{job.source}, episode {item.id}"
                try:
                    item = rules.episode(item)
                    if item.task not in tasks:
                        raise DataError(
                            f"belongs to the task {item.task!r}, which the converter did not list in tasks()"
                        )
                    unknown.update(set(item.fields) - {f.name for f in tasks[item.task].fields})
                    item = conform(item, tasks[item.task], where)
                    writer.write(item)
                except DataError as error:
                    reject(BadEpisode(where, str(error).removeprefix(where + ": ")))
                    continue
                episodes, steps = episodes + 1, steps + item.steps
                for name, counts in outside(item, tasks[item.task]).items():
                    _add(beyond, (item.task, name), counts)
        except DataError as error:  # the rest of the piece cannot be read
            if not job.skip_bad or isinstance(error, AmbiguousNames):
                raise
            bad.append(BadEpisode(f"{job.source}, piece {job.piece.name} after {episodes} episodes", str(error)))
        notes = [*reader.notes, *(f"left out: field {name} ({_LATE})" for name in sorted(unknown))]
        report = {"episodes": episodes, "steps": steps, "bad": [asdict(b) for b in bad], "notes": notes}
        report["outside"] = [[*key, *counts] for key, counts in beyond.items()]
        Store(job.destination).write(f"pieces/{job.piece.name}.json", to_json(report).encode())
    return job.piece.name


def _kept(rules: Mapping, tasks: list[TaskSpec], format: str) -> tuple[str, ...]:
    """The fields whose videos are copied. Raises DataError if the format or another option rules that out."""
    kept = rules.kept(tasks)
    if kept and format != "lerobot":
        raise DataError(
            f"mapping: fields.{kept[0]}: `encoding: keep` copies videos of the format lerobot, not of {format}"
        )
    if kept and rules.options.get("resize"):
        raise DataError(
            f"mapping: fields.{kept[0]}: a video with `encoding: keep` cannot be resized; remove `resize` or `keep`"
        )
    return kept


def _add(counts: dict[tuple[str, str], tuple[int, int]], key: tuple[str, str], more: tuple[int, int]) -> None:
    known = counts.get(key, (0, 0))
    counts[key] = known[0] + more[0], known[1] + more[1]


_readers: dict[str, Reader] = {}  # the reader of this process, used again for the next piece


def _reader(job: Job) -> Reader:
    options, fields = job.mapping.get("options") or {}, job.mapping.get("fields") or {}
    key = json.dumps(
        [job.source, job.target, options, fields, job.dropped, job.kept, job.memory, job.timeout], sort_keys=True
    )
    if key not in _readers:
        _close_readers()
        _readers[key] = Reader(
            job.source,
            job.target,
            options,
            fields,
            dropped=job.dropped,
            kept=job.kept,
            memory=job.memory,
            timeout=job.timeout,
        )
    return _readers[key]


@atexit.register
def _close_readers() -> None:
    for reader in _readers.values():
        reader.close()
    _readers.clear()


def _load_mapping(given: str | Dict[str, Any] | None) -> Mapping:
    if given is None:
        return Mapping()
    return Mapping.load(given) if isinstance(given, str) else Mapping.from_dict(dict(given))


def _plan(job: Job, pieces: list[Piece], versions: list[list[str]]) -> bytes:
    """The conversion as JSON, with a digest that two runs must share to be the same conversion.

    `skip_bad` is not part of it: a piece that was finished has the same bytes with and without.
    """
    plan = {
        "converter": job.target,
        "source": Source(job.source).name,
        "tasks": job.tasks,
        "mapping": job.mapping,
        "encodings": job.encodings,
        "shard_bytes": job.shard_bytes,
    }
    state = hashlib.blake2b(json.dumps(plan, sort_keys=True, default=list).encode(), digest_size=16)
    for piece, version in zip(pieces, versions, strict=True):
        state.update(json.dumps([piece.name, dict(piece.data), version], sort_keys=True).encode())
    return to_json(
        {"digest": state.hexdigest(), "pieces": len(pieces), **plan}, sort_keys=True, indent=1, default=list
    ).encode()


def _finished_pieces(store: Store, destination: str, plan: bytes) -> set[str]:
    """Names of the pieces that an earlier run has finished. The first run writes the plan.

    Raises FileExistsError if the destination holds a dataset or another conversion.
    """
    existing = set(store.list("pieces"))
    if PLAN in existing:
        old = json.loads(store.read(PLAN))
        if old.get("digest") != json.loads(plan)["digest"]:
            differs = [k for k, v in json.loads(plan).items() if old.get(k) != v and k != "digest"] or [
                "the source's files"
            ]
            raise FileExistsError(
                f"{destination} holds another conversion, which differs in {', '.join(differs)}; "
                "choose another folder, or delete this one"
            )
    else:
        try:
            store.head("dataset.json")
        except FileNotFoundError:
            store.write(PLAN, plan)
        else:
            raise FileExistsError(f"{destination} already holds a dataset; choose another folder, or delete it")
    suffix = ".parquet"
    return {
        p.removeprefix("pieces/")[: -len(suffix)]
        for p in existing
        if p.endswith(suffix) and not p.endswith(".statistics.parquet")
    }


def _finish(
    store: Store, job: Job, format: str, tasks: list[TaskSpec], pieces: list[Piece], notes: list[str]
) -> ConversionReport:
    source, destination = job.source, job.destination
    episodes = steps = 0
    bad: list[BadEpisode] = []
    beyond: dict[tuple[str, str], tuple[int, int]] = {}
    notes = list(notes)
    for piece in pieces:
        part = json.loads(store.read(f"pieces/{piece.name}.json"))
        episodes, steps = episodes + part["episodes"], steps + part["steps"]
        bad += [BadEpisode(**b) for b in part["bad"]]
        for task, name, *counts in part.get("outside", ()):
            _add(beyond, (task, name), (counts[0], counts[1]))
        notes += part.get("notes", [])
    notes += outside_notes(beyond, tasks)
    if not episodes:
        listed = "; ".join(str(b) for b in bad[:3]) or "the source has no episodes"
        raise DataError(f"{destination}: no episode could be converted ({listed})")
    report = ConversionReport(
        destination, format, tuple(t.name for t in tasks), episodes, steps, tuple(bad), tuple(dict.fromkeys(notes))
    )
    content = asdict(report)
    del content["destination"]  # the same conversion gives the same bytes in any folder
    store.write(REPORT, to_json(content, indent=1, ensure_ascii=False).encode())
    try:
        merge_pieces(destination, [p.name for p in pieces])
    except DataError:
        _check_ids(store, source, pieces)
        raise
    return report


def _check_ids(store: Store, source: str, pieces: list[Piece]) -> None:
    """Raises AmbiguousNames, with the places of both, if two episodes of different pieces have one id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seen: dict[str, tuple[Piece, int]] = {}
    for piece in pieces:
        data = pa.BufferReader(store.read(f"pieces/{piece.name}.parquet"))
        for number, identity in enumerate(pq.read_table(data, columns=["id"])["id"].to_pylist()):
            if identity in seen:
                raise AmbiguousNames(_same_id(identity, source, *seen[identity], piece, number))
            seen[identity] = piece, number


def _same_id(identity: str, source: str, first: Piece, a: int, second: Piece, b: int) -> str:
    places = [f"{_place(source, piece)} (readable episode {number})" for piece, number in ((first, a), (second, b))]
    return (
        f"{source}: two episodes have the id {identity!r}: one in {places[0]}, one in {places[1]}. If they are the same "
        "episode, remove one of the two; if they are not, convert the two parts of the source into datasets of their own. "
        "--skip-bad does not choose between them"
    )


def _place(source: str, piece: Piece) -> str:
    files = [str(f) for f in piece.data.get("files") or [piece.data.get("folder") or f"piece {piece.name}"]]
    return ", ".join(f"{source}/{f}" for f in files[:3]) + (f" … ({len(files)} files)" if len(files) > 3 else "")


# ---- where the pieces run --------------------------------------------------------------------------------------------


def _run_locally(jobs: Iterator[Job], count: int, processes: int) -> Iterator[str]:
    """Convert `processes` pieces at a time; yields the name of each finished piece. The first error stops all."""
    workers = min(processes or os.cpu_count() or 1, count)
    if workers <= 1:
        try:
            yield from map(convert_piece, jobs)
        finally:
            _close_readers()
        return
    pool = ProcessPool(workers, die_with_parent, (os.getpid(),))
    try:
        pending: set[Future[str]] = set()
        for job in jobs:
            pending.add(pool.submit(convert_piece, job))
            if len(pending) >= 2 * workers:
                yield from _completed(pending)
        while pending:
            yield from _completed(pending)
    except BrokenProcessPool as error:
        raise DataError(
            f"a converting process was killed (out of memory?): {error}; run the command again with fewer processes"
        ) from None
    except BaseException:
        pool.kill()  # the next run writes unfinished pieces again
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _completed(pending: set[Future[str]]) -> Iterator[str]:
    """Wait for at least one piece; yields the names of those that are finished, and removes them from `pending`."""
    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in finished:
        pending.discard(future)
        yield future.result()


def _run_on_ray(jobs: Iterator[Job], count: int, processes: int) -> Iterator[str]:
    """The same as `_run_locally` on a Ray cluster. Every node must be able to reach source and destination."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("--on ray needs Ray: pip install 'tiphys[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)  # a dashboard runs jobs of whoever reaches it
    try:
        workers = processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1, max_retries=3)(convert_piece)
        pending: list[Any] = []
        for job in jobs:
            pending.append(task.remote(job))
            if len(pending) >= 2 * workers:
                yield from _completed_on_ray(pending)
        while pending:
            yield from _completed_on_ray(pending)
    finally:
        if started:
            ray.shutdown()


def _completed_on_ray(pending: list[Any]) -> Iterator[str]:
    import ray

    ready, rest = ray.wait(pending)
    pending[:] = rest
    for reference in ready:
        try:
            yield ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else DataError(str(error))) from None
