"""Untrusted sources: decompression bombs, paths and links out of the source, pickles, huge sizes.

Each is refused before it takes memory or has an effect.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.convert_sources import (
    d4rl,
    dqn_replay,
    example,
    image_text,
    lerobot_v2,
    npz,
    picture,
    rlds,
    robomimic,
    tfrecord,
    zarr_buffer,
)
from tests.dataio.convert.test_convert_formats import reader
from tiphys.dataio.convert.converter import BadEpisode
from tiphys.dataio.convert.limits import BoundedInflate, check_shape, decode_image, inflate, read_npy
from tiphys.dataio.convert.source import expand
from tiphys.dataio.convert.tfrecord import parse_example, records
from tiphys.dataio.episode import DataError


def problem(folder: Path, format: str) -> str:
    """The error message of the first malformed episode or of the source; empty if all can be read."""
    try:
        converter = reader(folder, format)
        converter.tasks()
        for piece in converter.pieces():
            for item in converter.episodes(piece):
                if isinstance(item, BadEpisode):
                    return item.reason
    except DataError as error:
        return str(error)
    return ""


@contextmanager
def limited_memory(extra: int = 256 << 20) -> Iterator[None]:
    """Limit this process to `extra` bytes more than it has, so that an allocation before a check fails."""
    page = resource.getpagesize()
    used = int(Path("/proc/self/statm").read_text().split()[5]) * page  # data + stack
    old = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + extra, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old)


class Code:
    """Unpickling an object of this class creates a folder `unpickled`."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


@pytest.fixture(autouse=True)
def work_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "unpickled").exists()


# ---- pickles


def test_npz_with_pickled_objects(tmp_path: Path) -> None:
    npz(tmp_path / "s")
    np.savez(tmp_path / "s/000.npz", actions=np.array([Code(), 1], object), allow_pickle=True)
    assert "pickle" in problem(tmp_path / "s", "npz")


def test_dqn_replay_with_pickled_objects(tmp_path: Path) -> None:
    dqn_replay(tmp_path / "s")
    out = io.BytesIO()
    np.save(out, np.array([Code()], object), allow_pickle=True)
    (tmp_path / "s/Pong/1/replay_logs/$store$_action_ckpt.0.gz").write_bytes(gzip.compress(out.getvalue()))
    assert "pickle" in problem(tmp_path / "s", "dqn-replay")


def test_zarr_with_a_pickle_codec(tmp_path: Path) -> None:
    zarr_buffer(tmp_path / "s.zarr")
    path = tmp_path / "s.zarr/data/action/.zarray"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "filters": [{"id": "pickle"}]}))
    assert "codec 'pickle' is not allowed" in problem(tmp_path / "s.zarr", "zarr")
    path.write_text(json.dumps({**metadata, "dtype": "|O"}))
    assert "dtype object cannot be read" in problem(tmp_path / "s.zarr", "zarr")
    (tmp_path / "s.zarr/data/action/0.0").write_bytes(pickle.dumps(Code()))
    path.write_text(json.dumps(metadata))
    assert "cannot be decoded" in problem(tmp_path / "s.zarr", "zarr")


# ---- bombs


def test_a_gzip_bomb() -> None:
    bomb = gzip.compress(b"\0" * (100 << 20), 9)
    with limited_memory(), pytest.raises(DataError, match="decompression bomb"):
        io.BufferedReader(BoundedInflate(io.BytesIO(bomb), "x")).read()
    with limited_memory(), pytest.raises(DataError, match="decompression bomb"):
        inflate(zlib.compress(b"\0" * 1000), "x", wbits=15, limit=999)
    assert inflate(zlib.compress(b"ab" * 500), "x", wbits=15, limit=1000) == b"ab" * 500


def test_cut_or_damaged_gzip() -> None:
    good = gzip.compress(os.urandom(1000))
    for bad in (good[:500], good[:40] + b"\xff\xff\xff" + good[43:]):
        with pytest.raises(DataError, match=r"truncated|damaged"):
            inflate(bad, "x", wbits=31, limit=1 << 20)


def test_a_zip_bomb(tmp_path: Path) -> None:
    npz(tmp_path / "s")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10 << 20,)})
    with (
        zipfile.ZipFile(tmp_path / "s/000.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("actions.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(5):
            member.write(bytes(16 << 20))
    with limited_memory():
        assert "decompression bomb" in problem(tmp_path / "s", "npz")


def test_an_image_bomb() -> None:
    data = bytearray(picture(np.zeros((8, 8, 3), np.uint8)))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    with limited_memory(), pytest.raises(DataError, match="3600000000 pixels"):
        decode_image(bytes(data), "x")
    with pytest.raises(DataError, match="not a JPEG, PNG or WebP"):
        decode_image(b"GIF89a" + bytes(100), "x")
    with pytest.raises(DataError, match="not a JPEG, PNG or WebP"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x")  # Ghostscript is never started


# ---- invalid or huge shapes and lengths


def test_invalid_npy_headers() -> None:
    def npy(shape: str, descr: str = "'<f8'") -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64)

    for shape in (
        "(1 << 60,)",
        "(1000000000000,)",
        "(-1, 5)",
        "(9, 9)",
        "(True,)",
        "(1, 1, 1, 1, 1, 1, 1, 1, 1)",
        "[]*9",
    ):
        data = npy(shape)
        with limited_memory(), pytest.raises(DataError):
            read_npy(io.BytesIO(data), len(data), "x")
    for descr in ("'|O'", "'V8'", "[('a', '<f8')]", "'<f99'", "'|S0'"):
        data = npy("(8,)", descr)
        with pytest.raises(DataError):
            read_npy(io.BytesIO(data), len(data), "x")
    good = npy("(8,)")
    assert read_npy(io.BytesIO(good), len(good), "x").tolist() == [0.0] * 8


def test_check_shape() -> None:
    assert check_shape([2, np.int64(3)], 4, "x") == (2, 3)
    assert check_shape([1_000_000, 84, 84], 0, "x") == (1_000_000, 84, 84)  # read in parts
    for shape in ([-1], [1.5], [None], ["3"], [1 << 62, 1 << 62], [1] * 9):
        with pytest.raises(DataError):
            check_shape(shape, 4, "x")


def test_invalid_tfrecords() -> None:
    def reading(data: bytes) -> list[Any]:
        return [parse_example(r, "x") for r in records(io.BytesIO(data), len(data), "x")]

    good = tfrecord([example({"a": np.arange(3.0), "b": [b"x"], "c": np.array([-1, 2**62])})])
    found = reading(good)[0]
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"] == [b"x"]
    assert found["c"].tolist() == [-1, 2**62]
    huge = struct.pack("<Q", 1 << 62)
    from tiphys.dataio.convert.tfrecord import masked_crc

    with limited_memory(), pytest.raises(DataError, match="4,611,686,018,427,387,904 bytes"):
        reading(huge + struct.pack("<I", masked_crc(huge)) + b"x")
    with pytest.raises(DataError, match="fails its CRC"):
        reading(b"\x01" + good[1:])
    with pytest.raises(DataError, match="fail their CRC"):
        reading(good[:20] + bytes([good[20] ^ 1]) + good[21:])
    with pytest.raises(DataError, match="ends after"):
        reading(good[:-3])
    for body in (b"\x0a\xff\xff\xff\xff\x0f", b"\x0b", b"\x0a\x03\x0a\x7f\x00", b"\x80" * 20):
        with pytest.raises(DataError):
            reading(tfrecord([body]))


def test_rlds_with_inconsistent_steps_or_a_missing_shard(tmp_path: Path) -> None:
    rlds(tmp_path / "s")
    bad = example({"steps/action": np.zeros(7), "steps/reward": np.zeros(2)})
    (tmp_path / "s/toy-train.tfrecord-00000-of-00002").write_bytes(tfrecord([bad, bad]))
    assert "different numbers of steps" in problem(tmp_path / "s", "rlds")
    (tmp_path / "s/toy-train.tfrecord-00000-of-00002").unlink()
    assert "shard 0 of split 'train' is missing" in problem(tmp_path / "s", "rlds")


def test_hdf5_that_claims_terabytes(tmp_path: Path) -> None:
    import h5py

    robomimic(tmp_path / "s")
    with h5py.File(tmp_path / "s/low_dim.hdf5", "a") as file:
        del file["data/demo_0/obs/robot0_eef_pos"]
        file["data/demo_0/obs"].create_dataset("robot0_eef_pos", (5, 1 << 40), "f8", chunks=(1, 1024))
    with limited_memory():
        assert "needs 43,980,465,111,040 bytes" in problem(tmp_path / "s", "robomimic")


def test_parquet_with_far_too_many_rows(tmp_path: Path) -> None:
    """Dictionary encoding stores a long run of one value in a few bytes, which decode to far more memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lerobot_v2(tmp_path / "s")
    path = tmp_path / "s/data/chunk-000/episode_000000.parquet"
    one = pq.read_table(path).slice(0, 1)
    with pq.ParquetWriter(path, one.schema) as writer:
        big = pa.concat_tables([one] * 1).take(pa.array(np.zeros(2_000_000, np.int64)))
        writer.write_table(big)
    assert path.stat().st_size < 2 << 20
    assert "has 2,000,000 rows" in problem(tmp_path / "s", "lerobot")


# ---- paths, links and other files


def test_paths_that_leave_the_source(tmp_path: Path) -> None:
    secret = tmp_path / "secret.parquet"
    secret.write_bytes(b"secret")
    lerobot_v2(tmp_path / "s")
    info = tmp_path / "s/meta/info.json"
    known = json.loads(info.read_text())
    for template in ("../secret.parquet", "/etc/passwd", "data/../../secret.parquet", str(secret)):
        info.write_text(json.dumps({**known, "data_path": template}))
        assert "leads out of the source" in problem(tmp_path / "s", "lerobot")
    for template in ("{episode_index.__class__}", "{episode_index!r}", "{episode_index:999999999d}", "{other}", None):
        info.write_text(json.dumps({**known, "data_path": template}))
        assert "path template" in problem(tmp_path / "s", "lerobot")
    assert expand("a-{n:03d}/{k}.x", "", n=7, k="v") == "a-007/v.x"


def test_links_that_leave_the_source(tmp_path: Path) -> None:
    (tmp_path / "secret.npz").write_bytes(b"secret")
    npz(tmp_path / "s")
    (tmp_path / "s/zzz.npz").symlink_to(tmp_path / "secret.npz")
    (tmp_path / "s/loop").symlink_to(tmp_path / "s")
    assert "leads out of the source" in problem(tmp_path / "s", "npz")
    (tmp_path / "s/zzz.npz").unlink()
    (tmp_path / "s/zzz.npz").symlink_to(tmp_path / "s/000.npz")
    assert problem(tmp_path / "s", "npz") == ""


def test_a_snapshot_in_a_hugging_face_cache(tmp_path: Path) -> None:
    """A snapshot consists of links into the `blobs` of the cache, which are followed."""
    npz(tmp_path / "made")
    cache = tmp_path / "datasets--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/0123").mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "made").iterdir())):
        file.rename(cache / f"blobs/{i}")
        (cache / "snapshots/0123" / file.name).symlink_to(f"../../blobs/{i}")
    assert problem(cache / "snapshots/0123", "npz") == ""


def test_links_inside_hdf5(tmp_path: Path) -> None:
    import h5py

    d4rl(tmp_path / "other")
    robomimic(tmp_path / "s")

    def problem_after(change: Callable[[Any], None]) -> str:
        with h5py.File(tmp_path / "s/low_dim.hdf5", "a") as file:
            if "actions" in file["data/demo_0"]:
                del file["data/demo_0/actions"]
            change(file["data/demo_0"])
        return problem(tmp_path / "s", "robomimic")

    other = str(tmp_path / "other/hopper.hdf5")

    def external(group: Any) -> None:
        group["actions"] = h5py.ExternalLink(other, "/actions")

    def soft(group: Any) -> None:
        group["actions"] = h5py.SoftLink("/data/demo_2/actions")

    def virtual(group: Any) -> None:
        layout = h5py.VirtualLayout((5, 2), "f4")
        layout[:] = h5py.VirtualSource(other, "actions", (12, 2))[:5]
        group.create_virtual_dataset("actions", layout)

    def raw(group: Any) -> None:
        group.create_dataset("actions", (5, 2), "f4", external=[(other, 0, h5py.h5f.UNLIMITED)])

    for change, message in (
        (external, "ExternalLink"),
        (soft, "SoftLink"),
        (virtual, "other files"),
        (raw, "other files"),
    ):
        assert message in problem_after(change)


def test_members_of_a_tar_that_are_not_files(tmp_path: Path) -> None:
    image_text(tmp_path / "s")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(tmp_path / "s/0.tar", "w") as tar:
            member = tarfile.TarInfo("a.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        assert "not a plain file" in problem(tmp_path / "s", "webdataset")


def test_a_playlist_is_not_accepted_as_video(tmp_path: Path) -> None:
    """FFmpeg would open the local files and URLs that a playlist or a concat script names."""
    for number, text in enumerate(
        ("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "ffconcat version 1.0\nfile /etc/passwd\n")
    ):
        lerobot_v2(tmp_path / f"s{number}")
        for path in (tmp_path / f"s{number}/videos").rglob("*.mp4"):
            path.write_text(text)
        assert "not an MP4, Matroska, WebM or AVI video" in problem(tmp_path / f"s{number}", "lerobot")


def test_a_video_that_does_not_fit_its_rows(tmp_path: Path) -> None:
    from tests.dataio.convert.convert_sources import scene, video

    lerobot_v2(tmp_path / "s")
    path = tmp_path / "s/videos/chunk-000/observation.images.top/episode_000000.mp4"
    video(path, scene(3, 0), 10)
    assert "no frame at 0.3000 s; the nearest is at 0.2000 s" in problem(tmp_path / "s", "lerobot")
    video(path, scene(5, 0), 4)
    assert "does not fit its rows" in problem(tmp_path / "s", "lerobot")


def test_an_external_link_is_not_followed_when_the_format_is_recognised(tmp_path: Path) -> None:
    """Following it would open the file that it names: here a pipe, which would block for ever."""
    import h5py

    from tiphys.dataio.convert.hdf5 import has
    from tiphys.dataio.convert.robomimic import Robomimic
    from tiphys.dataio.convert.source import Source

    robomimic(tmp_path / "other")
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "other/low_dim.hdf5", tmp_path / "pipe"):
        folder = tmp_path / f"s-{target.name}"
        folder.mkdir()
        with h5py.File(folder / "a.hdf5", "w") as file:
            file["data"] = h5py.ExternalLink(str(target), "/data")
            file["mask"] = h5py.SoftLink("/data/mask")
            assert has(file, "data")
        with pytest.raises(DataError, match="ExternalLink"):
            Robomimic.recognise(Source(str(folder)))
        assert "ExternalLink" in problem(folder, "robomimic")


def test_metadata_of_both_zarr_versions(tmp_path: Path) -> None:
    """The limits are checked on the metadata that is used for reading: version 3, as in the zarr library."""
    zarr_buffer(tmp_path / "s.zarr")
    zarr_buffer(tmp_path / "three.zarr", 3)
    for name in ("data/action", "meta/episode_ends"):
        (tmp_path / "s.zarr" / name / "zarr.json").write_bytes(
            (tmp_path / "three.zarr" / name / "zarr.json").read_bytes()
        )
    path = tmp_path / "s.zarr/data/action/zarr.json"
    metadata = json.loads(path.read_text())
    for change, message in (
        ({"shape": [1 << 40, 2], "chunk_grid": {"configuration": {"chunk_shape": [1 << 40, 2]}}}, "a chunk"),
        ({"codecs": [{"name": "pickle"}]}, "codec 'pickle' is not allowed"),
    ):
        path.write_text(json.dumps({**metadata, **change}))
        with limited_memory():
            assert message in problem(tmp_path / "s.zarr", "zarr")
