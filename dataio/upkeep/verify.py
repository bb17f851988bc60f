"""`verify` compares every byte of a dataset with its checksums and its tars with its index, and can repair the index."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import arrays, limited, table, tar
from tiphys.dataio.format.document import DATASET, INDEX, STATISTICS, dataset_document, fetch, parse, publish, sha256
from tiphys.dataio.format.rows import RowLayout, broken_row
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.place import resolve
from tiphys.dataio.messages import counted, printable, redacted
from tiphys.dataio.statistics import Statistics
from tiphys.dataio.upkeep import rebuild, verify_videos

if TYPE_CHECKING:
    from tiphys.dataio.storage import Store

_PIECE = 8 << 20  # bytes read at once


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset."""

    kind: str  # missing | index | truncated | structure | checksum | disagreement
    where: str  # the object
    message: str
    episode: str = ""  # the id of the episode that is affected, if it is one episode

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" (episode {self.episode!r})" if self.episode else "")


@dataclass
class Report:
    """The result of `verify`."""

    url: str
    episodes: int = 0
    shards: int = 0
    bytes: int = 0  # bytes of shards that were read
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # harmless, but worth knowing
    repairs: list[str] = field(default_factory=list)  # what `repair` changed
    repaired: frozenset[str] = frozenset()  # shards with episodes that an earlier repair moved to quarantine

    @property
    def ok(self) -> bool:
        return not self.findings

    def add(self, kind: str, where: str, message: str, episode: str = "") -> None:
        if where in self.repaired and not episode:
            self.notes.append(f"{where}: {message}; its broken episodes are in quarantine")
        else:
            self.findings.append(Finding(kind, where, message, episode))

    def __str__(self) -> str:
        head = f"{self.url}: {counted(self.episodes, 'episode')} in {counted(self.shards, 'shard')}, "
        head += f"{counted(self.bytes, 'byte')} read: "
        found = f"{len(self.findings)} findings" if self.findings else "no findings, the dataset is intact"
        lines = [head + found, *(f"  {f.kind}: {f}" for f in self.findings)]
        lines += [f"  note: {n}" for n in self.notes] + [f"  repaired: {r}" for r in self.repairs]
        return redacted(printable("\n".join(lines)))

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "repaired": sorted(self.repaired)}


def verify(
    url: str, repair: bool = False, progress: Callable[[int, int], None] | None = None, *, full: bool = False
) -> Report:
    """Read a whole dataset and check sizes, tar structure, every CRC, and whether index and shards agree.

    With `repair`, broken episodes are moved from the index to the list `quarantine` in dataset.json, and a missing or damaged
    index is made again from the shards. No shard is ever rewritten. `progress(done, total)` is called after each shard.

    Of videos that Tiphys did not write, it checks size and version, and the bytes if their checksums are in the index. With
    `full`, every picture, video and text is decoded too.

    Raises FileNotFoundError if there is neither dataset.json nor index.parquet.
    """
    from tiphys.dataio.storage import Store

    store, report = Store(resolve(url)), Report(url)
    scratch = Path(tempfile.mkdtemp(prefix="tiphys-verify-"))
    try:
        index = _load(store, scratch, report, repair)
        if index is not None:
            _verify_statistics(store, index, scratch, report, repair)
            reasons, statistics = _verify_shards(store, index, scratch, report, repair, progress)
            if full:
                reasons |= _decode(index, reasons, report)
            _compare_listing(store, index, report)
            if repair and (reasons or report.repairs):
                _rewrite(store, index, reasons, scratch, statistics)
                report.repairs.append(f"{len(reasons)} of {index.episodes} episodes were moved to quarantine")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def _load(store: Store, scratch: Path, report: Report, repair: bool) -> EpisodeIndex | None:
    """The dataset's index, made again from the shards if that is needed and allowed; None if there is no usable index."""
    file = scratch / INDEX
    try:
        fetch(store, INDEX, file)
    except FileNotFoundError:
        report.add("missing", INDEX, "there is no index; `verify --repair` makes it again if Tiphys wrote the shards")
    try:
        document = parse(store.read(DATASET), f"{store.url}/{DATASET}")
    except FileNotFoundError:
        if not file.exists():
            raise FileNotFoundError(f"{store.url} is not a dataset: it has neither {DATASET} nor {INDEX}") from None
        report.add("missing", DATASET, "it was never written or is lost; `verify --repair` makes it from the index")
        document = None
    except DataError as error:
        report.add("index", DATASET, str(error))
        document = None
    if file.exists():
        index = _accept(store, file, document, scratch, report, repair)
        if index is not None:
            return index
    if document is None or not repair:
        return None
    return _rebuild(store, document, scratch, report)


def _accept(
    store: Store, file: Path, document: dict[str, Any] | None, scratch: Path, report: Report, repair: bool
) -> EpisodeIndex | None:
    """The index in `file`, or None if it is damaged. Its document is dataset.json or, if that has another digest, made anew."""
    try:
        own = parse(to_json(dataset_document(file, Statistics())).encode(), f"{store.url}/{INDEX}")
        digest = sha256(file)
        if document is not None and document["digests"][INDEX] != digest:
            report.add(
                "index",
                INDEX,
                f"it does not have the SHA-256 that {DATASET} names: it is damaged, or a rewrite was interrupted",
            )
        names = [t.name for t in own["tasks"]], [s.name for s in own["shards"]]
        out = scratch / "arrays"
        out.mkdir()
        loaded = limited.decode(file, out, *names, f"{store.url}/{INDEX}")
        arrays.check(loaded, own["tasks"], own["shards"], f"{store.url}/{INDEX}")
    except DataError as error:
        report.add("index", INDEX, str(error))
        shutil.rmtree(scratch / "arrays", ignore_errors=True)
        return None
    if document is not None and document["digests"][INDEX] == digest:
        own = document
    else:
        own["quarantine"] = (document or {}).get("quarantine", [])
        if repair:
            report.repairs.append(f"{DATASET} was made again from {INDEX}")
    return EpisodeIndex(store.url, own, loaded, digest)


def _rebuild(store: Store, document: dict[str, Any], scratch: Path, report: Report) -> EpisodeIndex | None:
    """The index made again from the shards. This is only possible if every sample of the shards is an episode of the dataset."""
    if "skipped" in document:
        report.add("index", INDEX, "Tiphys did not write these tars: make the index again with `tiphys index`")
        return None
    if any("://" in s.name for s in document["shards"]):
        report.add(
            "index",
            INDEX,
            "some shards belong to other datasets: repeat the merge, append, filter or split that made it",
        )
        return None
    layouts = {t.name: RowLayout(t) for t in document["tasks"]}
    folder = scratch / "rebuilt"
    folder.mkdir()
    writer = table.TableWriter(folder)
    for shard in document["shards"]:
        file = _local(store, shard, scratch, Report(store.url))  # findings come when the shard is verified
        for record in rebuild.records(file, shard.name, layouts) if file is not None else ():
            if isinstance(record, DataError):
                report.add("structure", shard.name, str(record))
            else:
                writer.add(record)
    writer.finish(scratch / INDEX, document["tasks"], document["shards"])
    document["digests"][INDEX] = sha256(scratch / INDEX)
    report.repairs.append(f"{INDEX} was made again from {len(document['shards'])} shards")
    return _accept(store, scratch / INDEX, document, scratch, report, True)


def _verify_statistics(store: Store, index: EpisodeIndex, scratch: Path, report: Report, repair: bool) -> None:
    wanted = index.document["digests"].get(STATISTICS)
    if wanted is None:  # dataset.json was made again from the index and names no statistics
        return
    try:
        if fetch(store, STATISTICS, scratch / "old-statistics.parquet") == wanted:
            return
        report.add("checksum", STATISTICS, f"it does not have the SHA-256 that {DATASET} names")
    except FileNotFoundError:
        report.add("missing", STATISTICS, "there are no statistics")
    if repair:
        report.repairs.append(f"{STATISTICS} was made again from the shards")


def _local(store: Store, shard: table.Shard, scratch: Path, report: Report) -> Path | None:
    """Download a shard and compare it with its size and CRC in the index; None if it is missing or empty."""
    file = scratch / "shard.tar"
    try:
        fetch(store, shard.name, file)
    except FileNotFoundError:
        report.add("missing", shard.name, "the shard does not exist")
        return None
    size = file.stat().st_size
    report.bytes += size
    if size != shard.size:
        kind = "truncated" if size < shard.size else "disagreement"
        report.add(kind, shard.name, f"the shard has {size} bytes, but {shard.size} were written")
    elif shard.crc >= 0 and _crc(file) != shard.crc:
        report.add("checksum", shard.name, "the CRC-32C of the shard does not match: bytes have changed")
    return file if size else None


def _crc(file: Path) -> int:
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(_PIECE):
            crc = crc32c(block, crc)
    return crc


def _verify_shards(
    store: Store,
    index: EpisodeIndex,
    scratch: Path,
    report: Report,
    repair: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, str], Statistics]:
    """The broken episodes with the reason, and the statistics of the others (empty unless `repair`)."""
    report.episodes, report.shards = index.episodes, len(index.shards)
    report.repaired = frozenset(q["shard"] for q in index.document.get("quarantine", []))
    order = np.argsort(index.shard, kind="stable")
    bounds = np.searchsorted(index.shard[order], np.arange(len(index.shards) + 1))
    reasons: dict[int, str] = {}
    statistics = Statistics()
    videos = verify_videos.users(index)
    for number, shard in enumerate(index.shards):
        if number in videos:
            reasons |= verify_videos.verify_video(store, index, shard, videos[number], report.add)
            if progress is not None:
                progress(number + 1, len(index.shards))
            continue
        mine = order[bounds[number] : bounds[number + 1]]
        file = _local(store, shard, scratch, report)
        if file is None:
            reasons |= dict.fromkeys(mine.tolist(), "its shard is missing")
        else:
            reasons |= _verify_shard(index, mine, file, shard.name, report, statistics if repair else None)
        if progress is not None:
            progress(number + 1, len(index.shards))
    return reasons, statistics


def _verify_shard(
    index: EpisodeIndex, episodes: np.ndarray, file: Path, shard: str, report: Report, statistics: Statistics | None
) -> dict[int, str]:
    """Report the findings of one shard. Returns episode -> what is wrong with it."""
    samples = dict[int, tar.Sample]()
    end, whole = 0, True
    try:
        for sample in limited.samples(file):
            samples[sample.begin] = sample
            end = sample.end
    except DataError as error:
        report.add("structure", shard, str(error))
        whole = False  # episodes behind a damaged header can still be read: only their own bytes decide
    reasons: dict[int, str] = {}
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for e in episodes.tolist():
            data = memoryview(mapped)
            try:
                begin, _ = index.sample_range(e)
                at = samples.pop(begin) if begin in samples else None
                if at is None and (whole or begin < end):
                    raise DataError(f"the index says that its sample begins at byte {begin}, but none does")
                _verify_episode(index, e, data, at, statistics)
            except DataError as error:
                reasons[e] = str(error)
                kind = "checksum" if "CRC-32C" in reasons[e] else "disagreement"
                report.add(kind, shard, reasons[e], index.id(e))
            finally:
                data.release()
    if samples:
        known = {q.get("sample") for q in index.document.get("quarantine", []) if q.get("shard") == shard}
        unknown = [s for s in samples.values() if s.begin not in known]
        if unknown:
            report.notes.append(
                f"{shard}: {len(unknown)} samples are not in the index; the first is {unknown[0].key!r}"
            )
    return reasons


def _decode(index: EpisodeIndex, reasons: dict[int, str], report: Report) -> dict[int, str]:
    """Decode all episodes without a reason so far. Returns episode -> why it cannot be decoded."""
    found: dict[int, str] = {}
    for e in range(index.episodes):
        if e not in reasons and (wrong := verify_videos.decode_all(index, e)):
            found[e] = wrong
            report.add("structure", index.shard_name(int(index.shard[e])), wrong, index.id(e))
    return found


def _verify_episode(
    index: EpisodeIndex, e: int, data: memoryview, sample: tar.Sample | None, statistics: Statistics | None
) -> None:
    """Raises DataError with the first thing that is wrong with an episode."""
    begin, size = index.sample_range(e)
    if begin + size > len(data):
        raise DataError(f"its bytes {begin}–{begin + size - 1} reach beyond the end of the shard")
    offset, rows = int(index.rows_offset[e]), int(index.rows[e])
    if offset >= 0:
        one = index.row_bytes(int(index.task[e]))
        content = data[offset : offset + rows * one]
        broken = broken_row(content, one)
        if broken >= 0:
            at = offset + broken * one
            raise DataError(f"steps.npy, bytes {at}–{at + one - 1}: the CRC-32C of row {broken} does not match")
    layout = index.layouts[index.task[e]]
    for spec in layout.large:
        if verify_videos.is_elsewhere(index, e, spec.name):
            continue
        for chunk in index.chunks(e, spec, 0, rows):
            if chunk.crc >= 0 and crc32c(data[chunk.offset : chunk.offset + chunk.size]) != chunk.crc:
                end = chunk.offset + chunk.size - 1
                raise DataError(f"{spec.name}, bytes {chunk.offset}–{end}: the chunk's CRC-32C does not match")
    if offset >= 0:
        if sample is not None:
            _verify_sample(index, e, data, sample, layout)
        if statistics is not None:
            statistics.add(layout, index.id(e), np.frombuffer(bytes(content), layout.dtype))


def _verify_sample(index: EpisodeIndex, e: int, data: memoryview, sample: tar.Sample, layout: RowLayout) -> None:
    """Compare the members of a sample that ShardWriter wrote with the index. Raises DataError if they differ."""
    if not {"json", "steps.npy"} <= set(sample.members):
        raise DataError(f"sample {sample.key!r} has no .json or no .steps.npy member")
    own = rebuild.parse_sample_json(rebuild.member_bytes(data, sample.members["json"]))
    if (own["id"], own["task"], own["steps"]) != (index.id(e), layout.task.name, int(index.steps[e])):
        raise DataError(
            f"sample {sample.key!r} holds episode {own['id']!r} of task {own['task']!r} with {own['steps']} steps; "
            "the index names another one"
        )
    if rebuild.rows_offset(sample.members["steps.npy"], data, layout) != int(index.rows_offset[e]):
        raise DataError(f"sample {sample.key!r}: the rows of steps.npy do not begin where the index says")
    places = [(m.offset, m.offset + m.size, n) for n, m in sample.members.items()]
    for spec in layout.large:
        if verify_videos.is_elsewhere(index, e, spec.name):
            continue
        members = [(a, b) for a, b, n in places if n.startswith(f"{spec.name.lower()}.")]
        for chunk in index.chunks(e, spec, 0, int(index.rows[e])):
            if not any(a <= chunk.offset and chunk.offset + chunk.size <= b for a, b in members):
                raise DataError(f"{spec.name}: the chunk at byte {chunk.offset} lies in none of the field's members")


def _rewrite(store: Store, index: EpisodeIndex, reasons: dict[int, str], scratch: Path, statistics: Statistics) -> None:
    """Rewrite the index without the broken episodes, and list these with the reason in dataset.json."""
    keep = np.ones(index.episodes, bool)
    keep[list(reasons)] = False
    out = scratch / "kept"
    out.mkdir()
    videos = verify_videos.users(index)
    used = [s for n, s in enumerate(index.shards) if n not in videos or any(keep[e] for e, _ in videos[n])]
    table.combine([table.Part(scratch / INDEX, keep)], out / INDEX, index.tasks, used)
    before: list[dict[str, Any]] = index.document.get("quarantine", [])
    listed = []
    for e, reason in sorted(reasons.items()):
        place = {"shard": index.shard_name(int(index.shard[e])), "sample": index.sample_range(e)[0]}
        listed.append({"id": index.id(e), "task": index.tasks[index.task[e]].name, **place, "reason": reason})
    again = {(q["shard"], q["sample"]) for q in listed}
    listed = [q for q in before if (q["shard"], q["sample"]) not in again] + listed
    kept = {k: index.document[k] for k in ("skipped", "notes", "source") if k in index.document}
    publish(store, out / INDEX, statistics, quarantine=listed, **kept)


def _compare_listing(store: Store, index: EpisodeIndex, report: Report) -> None:
    """Notes on shards that are in the folder but not in the index, and on episodes with the same id."""
    unverified = [f for f in index.packet_fields if not len(index.packets(f).crc)]  # type: ignore[union-attr]
    if unverified:
        report.notes.append(
            f"video bytes unverified: {', '.join(unverified)}; `tiphys index --crc` stores their checksums"
        )
    unique = len(np.unique(index.hash))
    if unique < index.episodes:
        report.notes.append(f"{index.episodes - unique} episodes have the id of another episode")
    listed = {s.name for s in index.shards}
    try:
        present: Sequence[str] = store.list("shards")
    except (OSError, DataError) as error:  # a plain web server cannot list
        report.notes.append(f"the folder cannot be listed ({error}), so shards outside the index were not looked for")
        return
    for name in present:
        if name.endswith(".tar") and name not in listed:
            report.notes.append(
                f"{name} is not in the index: an interrupted writer left it, or another dataset uses it"
            )
