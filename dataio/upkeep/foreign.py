"""`index_foreign` makes a dataset of WebDataset image-text tars that Tiphys did not write. The tars are not changed."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crc32c import crc32c

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.format import captions, limited, tar
from tiphys.dataio.format.document import DATASET, INDEX, fetch, publish
from tiphys.dataio.format.table import Chunks, Record, Shard, TableWriter
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.statistics import Statistics
from tiphys.dataio.upkeep.rebuild import member_bytes
from tiphys.paths import absolute

if TYPE_CHECKING:
    from tiphys.dataio.storage import Store

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z")
_MAX_NOTES = 1000  # samples that are listed in dataset.json


def index_foreign(
    url: str,
    destination: str = "",
    *,
    task: str = "caption",
    shards: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeIndex:
    """Index the tars of a folder as a dataset of captioned images. The index is written there, or to `destination`.

    Each sample with a picture becomes an episode of T = 0 actions, with the fields `image` (its shape may differ between
    episodes) and `text` (absent if the sample has no caption). `tiphys.dataio.format.captions` tells where both are. Samples
    without a picture, and those whose caption cannot be read, are skipped. In dataset.json, `skipped` counts them, and
    `notes` lists them and the samples without a caption. Each tar is read once, in full, to compute CRCs.

    task      name of the dataset's one task
    shards    paths of the tars; by default every .tar in the folder. Needed if the store cannot list.
    progress  called with (tars done, tars in total)

    Raises DataError if a tar is damaged or compressed or contains a link, or if no sample has a picture, FileNotFoundError if
    there is no tar, and FileExistsError if there is a dataset already.
    """
    from tiphys.dataio.storage import Store

    source = Store(url)
    target = Store(destination) if destination else source
    if target.exists(DATASET):
        raise FileExistsError(f"{target.url} is already a dataset; choose another destination")
    listed_files = [] if shards else [p for p in source.list() if not _is_hidden(p)]
    names = sorted(shards) or [p for p in listed_files if p.endswith(".tar")]
    packed = [p for p in shards or listed_files if p.endswith(COMPRESSED)]
    if packed:
        raise DataError(
            f"{url}: {', '.join(packed[:3])}: samples inside a compressed archive cannot be indexed in place. Decompress it to a "
            "plain .tar, or use `tiphys convert --from webdataset`, which reads .tar.gz"
        )
    if not names:
        raise FileNotFoundError(f"{url} has no .tar to index")
    scratch = Path(tempfile.mkdtemp(prefix="tiphys-index-"))
    try:
        writer, listed, samples, skipped = TableWriter(scratch), list[Shard](), 0, 0
        notes: list[str] = []
        for number, name in enumerate(names):
            shard = Shard(f"{absolute(url)}/{name}" if destination else name, *_size_and_crc(source, name, scratch))
            for record, note in _records(scratch / "shard.tar", shard.name, name[: -len(".tar")], task):
                samples += 1
                if record is None:
                    skipped += 1
                else:
                    writer.add(record)
                if note and len(notes) < _MAX_NOTES:
                    notes.append(f"{name}, {note}")
            listed.append(shard)
            if progress is not None:
                progress(number + 1, len(names))
        if skipped == samples:
            raise DataError(
                f"{url}: none of the {samples:,} samples in {len(names):,} tars has a picture "
                f"({', '.join(captions.IMAGES)}); an empty dataset is not written"
            )
        writer.finish(scratch / INDEX, [caption_task(task)], listed)
        publish(target, scratch / INDEX, Statistics(), skipped=skipped, notes=notes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return EpisodeIndex.open(target.url)


def caption_task(name: str) -> TaskSpec:
    """The task of captioned images: an image of any size, and a text."""
    return TaskSpec(
        name,
        (
            FieldSpec("image", "observation", "image", "uint8", (0, 0, 3), (0.0,), (255.0,), 256),
            FieldSpec("text", "text", "text", "str", per="episode"),
        ),
    )


def _size_and_crc(store: Store, name: str, scratch: Path) -> tuple[int, int]:
    file = scratch / "shard.tar"
    fetch(store, name, file)
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(8 << 20):
            crc = crc32c(block, crc)
    return file.stat().st_size, crc


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _records(file: Path, shard: str, stem: str, task: str) -> Iterator[tuple[Record | None, str]]:
    """For each sample: its record, or None if it is skipped; and what there is to say about it."""
    if not file.stat().st_size:
        raise DataError(f"{shard} is empty")
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = memoryview(mapped)
        try:
            for sample in limited.samples(file):
                yield _record(sample, data, shard, stem, task)
        except DataError as error:
            raise DataError(f"{shard}: {error}") from None
        finally:
            data.release()


def _record(sample: tar.Sample, data: memoryview, shard: str, stem: str, task: str) -> tuple[Record | None, str]:
    texts, note = {}, ""
    try:
        identity = f"{stem}/{captions.check_key(sample.key)}"
        picture = captions.picture_extension(sample.members)
        member = sample.members[picture]
        content = member_bytes(data, member)
        kind = _kind(content, picture)
        texts["text"], _ = captions.caption(sample.members, picture, lambda e: member_bytes(data, sample.members[e]))
    except captions.NoCaption as error:
        note = f"sample {sample.key!r} has no text: {error}"
    except DataError as error:
        return None, f"sample {sample.key!r} is left out: {error}"
    record = Record(
        id=identity,
        task=task,
        steps=0,
        rows=1,
        total_return=0.0,
        shard=shard,
        sample=sample.begin,
        sample_bytes=sample.end - sample.begin,
        texts=texts,
        chunks={"image": Chunks(kind, 1, [member.offset], [member.size], [crc32c(content)])},
    )
    return record, note


def _kind(content: bytes, extension: str) -> str:
    """The picture's format by its first bytes; its file name may be wrong. Raises DataError for other formats."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise DataError(f"its .{extension} is not a JPEG, PNG or WebP")
