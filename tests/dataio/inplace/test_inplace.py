"""A LeRobot dataset that is indexed where it is equals the one that a conversion makes of it, in every bit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crc32c import crc32c

from tests.dataio.convert.convert_sources import lerobot_v2
from tests.dataio.inplace import crashing
from tests.dataio.inplace.made import FIELDS, LENGTHS, batches, converted, make_plan, source
from tiphys.dataio.dataset import filter, inspect, merge, read_episode, verify
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.places import Range
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace import summary
from tiphys.dataio.inplace.build import IndexOptions, index_lerobot
from tiphys.dataio.inplace.place import location
from tiphys.dataio.inplace.prepare import cost_line, prepare
from tiphys.dataio.placement import Home

TOP = "observation.images.top"


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("raw") / "robot")


@pytest.fixture(scope="module")
def indexed(robot: Path) -> EpisodeIndex:
    return index_lerobot(str(robot), str(robot.parent / "indexed"), IndexOptions(crc=True))


@pytest.fixture(scope="module")
def stored(robot: Path) -> EpisodeIndex:
    return converted(robot, robot.parent / "converted")


def assert_same_episodes(index: EpisodeIndex, other: EpisodeIndex) -> None:
    assert list(index.ids) == list(other.ids)
    assert index.tasks == other.tasks
    for e in range(index.episodes):
        mine, theirs = read_episode(index, e).fields, read_episode(other, e).fields
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_plans_and_windows_equal_those_of_the_converted_dataset(indexed: EpisodeIndex, stored: EpisodeIndex) -> None:
    assert_same_episodes(indexed, stored)
    assert indexed.document["statistics"] == stored.document["statistics"]
    for step in range(20):
        plans = [make_plan(index).windows(step) for index in (indexed, stored)]
        assert all(np.array_equal(a, b) for a, b in zip(*plans, strict=True))
    assert batches(indexed) == batches(stored)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_version_2_equals_its_conversion(version: str, tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "robot")
    info = tmp_path / "robot/meta/info.json"
    info.write_text(info.read_text().replace('"v2.1"', f'"{version}"'))
    index = index_lerobot(str(tmp_path / "robot"), str(tmp_path / "indexed"))
    assert_same_episodes(index, converted(tmp_path / "robot", tmp_path / "converted"))


@pytest.mark.parametrize(
    ("codec", "gop"),
    [
        ("libx264", 250),
        ("libx265", 5),
        *(pytest.param(*one, marks=pytest.mark.long) for one in (("libx264", 2), ("libsvtav1", 3), ("libvpx-vp9", 4))),
    ],
)
def test_codecs_and_groups_of_any_length(codec: str, gop: int, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}: datasets of that codec are not tested")
    robot = source(tmp_path / "robot", codec, gop)
    assert_same_episodes(index_lerobot(str(robot), str(tmp_path / "indexed")), converted(robot, tmp_path / "converted"))


def test_any_window_is_a_slice_of_its_episode(indexed: EpisodeIndex) -> None:
    rng = np.random.default_rng(0)
    whole = [read_episode(indexed, e).fields for e in range(indexed.episodes)]
    for _ in range(100):
        e = int(rng.integers(indexed.episodes))
        start = int(rng.integers(LENGTHS[e]))
        rows = int(rng.integers(1, LENGTHS[e] - start + 1))
        ranges = indexed.ranges(e, start, rows, FIELDS)
        got = indexed.decode(e, start, rows, FIELDS, indexed.read(ranges))["fields"]
        assert all(np.array_equal(got[f], whole[e][f][start : start + rows]) for f in FIELDS[:4])


def test_any_number_of_processes_and_a_resume_see_the_same_batches(indexed: EpisodeIndex) -> None:
    reference = batches(indexed)
    for processes, split in ((3, 2), (7, 1)):
        found: dict[Any, Any] = {None: []}
        for process in range(processes):
            home = Home(process, processes)
            found |= batches(indexed, home, stop=split) | batches(indexed, home, start=split)
        assert found == reference


def test_the_source_is_not_written_to_and_the_index_is_the_same_each_time(robot: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in robot.rglob("*")}
    made = [index_lerobot(str(robot), str(tmp_path / name)) for name in ("a", "b")]
    assert {p: p.stat().st_mtime_ns for p in robot.rglob("*")} == before
    assert made[0].fingerprint == made[1].fingerprint
    with pytest.raises(DataError, match="must not be written into its source"):
        index_lerobot(str(robot), str(robot))


def test_an_index_that_was_moved_reads_the_same_videos(indexed: EpisodeIndex, robot: Path, tmp_path: Path) -> None:
    shutil.copytree(robot.parent / "indexed", tmp_path / "elsewhere")
    moved = EpisodeIndex.open(str(tmp_path / "elsewhere"), str(tmp_path / "cache"))
    assert moved.fingerprint == indexed.fingerprint
    assert batches(moved, stop=1) == batches(indexed, stop=1)


def test_a_source_that_was_moved_must_be_indexed_again(robot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    place = prepare(str(copy))
    (tmp_path / "elsewhere").mkdir()
    for folder in (copy, Path(place)):
        folder.rename(tmp_path / "elsewhere" / folder.name)
    moved = tmp_path / "elsewhere/robot"
    for url in (moved, location(str(moved))):
        with pytest.raises(DataError, match=rf"no longer at file://{copy}.*`tiphys index NEW-FOLDER`"):
            EpisodeIndex.open(str(url))
    with pytest.raises(DataError, match="no longer at"):
        prepare(str(moved))
    shutil.rmtree(location(str(moved)))
    assert EpisodeIndex.open(prepare(str(moved))).episodes == len(LENGTHS)


def test_an_indexed_dataset_merges_with_others(
    indexed: EpisodeIndex, stored: EpisodeIndex, robot: Path, tmp_path: Path
) -> None:
    few = filter(indexed.url, str(tmp_path / "few"), max_steps=9)
    rest = filter(stored.url, str(tmp_path / "rest"), min_steps=10)
    both = merge([few.url, rest.url], str(tmp_path / "both"))
    assert len(both.shards) < len(indexed.shards) + len(stored.shards)
    order = np.argsort(list(both.ids))
    for e, number in enumerate(order.tolist()):
        mine, theirs = read_episode(both, number).fields, read_episode(stored, e).fields
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert None in batches(both, stop=1)


def test_a_damaged_video_is_mended_by_quarantine_and_named(robot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    index = index_lerobot(str(copy), str(tmp_path / "indexed"), IndexOptions(crc=True))
    table = index.packets(TOP)
    assert table is not None
    damaged = 6
    file = copy / f"videos/{TOP}/chunk-000/file-002.mp4"
    data, at = bytearray(file.read_bytes()), int(table.offset[table.first[damaged + 1] - 1])
    data[at + 8] ^= 1
    file.write_bytes(data)
    events = batches(EpisodeIndex.open(index.url), stop=6)[None]
    assert {event["id"] for event in events} == {index.id(damaged)}
    assert "CRC-32C" in events[0]["reason"]
    assert "file-002.mp4" in events[0]["reason"]
    file.unlink()
    with pytest.raises((DataError, FileNotFoundError), match=r"file-002\.mp4"):
        read_episode(index, damaged)


def _edit(folder: Path, path: str, change: Any) -> None:
    pq.write_table(change(pq.read_table(folder / path)), folder / path)


def _column(name: str, values: Any) -> Any:
    return lambda table: table.set_column(
        table.schema.names.index(name), name, pa.array(values(table[name].to_pylist()))
    )


EPISODES, ROWS = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
FAULTS: dict[str, tuple[Any, str, int]] = {
    "length": (lambda f: _edit(f, EPISODES, _column("length", lambda v: [v[0] + 1, *v[1:]])), "metadata lists 10", 1),
    "task": (lambda f: _edit(f, ROWS, _column("task_index", lambda v: [7, *v[1:]])), "task_index 7", 1),
    "video": (lambda f: (f / f"videos/{TOP}/chunk-000/file-001.mp4").unlink(), "file-001.mp4: is missing", 2),
    "overlap": (
        lambda f: _edit(f, EPISODES, _column(f"videos/{TOP}/from_timestamp", lambda v: [v[0], v[0], *v[2:]])),
        "overlap", 1,
    ),
    "time": (
        lambda f: _edit(f, ROWS, _column("timestamp", lambda v: [*v[:3], v[3] + 0.04, *v[4:]])),
        "no frame at 0.3400 s; the nearest is at 0.3000 s", 1,
    ),
    "back": (
        lambda f: _edit(f, ROWS, _column("timestamp", lambda v: [*v[:3], v[1], *v[4:]])), "row 3 is shown before row 2", 1,
    ),
    "short": (
        lambda f: _edit(f, EPISODES, _column(f"videos/{TOP}/from_timestamp", lambda v: [*v[:6], v[6] + 5])), "no frame at", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_that_contradict_the_rows_are_fatal_for_their_episode(fault: str, robot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    damage, message, bad = FAULTS[fault]
    damage(copy)
    with pytest.raises(DataError, match=message):
        index_lerobot(str(copy), str(tmp_path / "strict"))
    index = index_lerobot(str(copy), str(tmp_path / "lenient"), IndexOptions(skip_bad=True))
    assert (index.episodes, index.document["skipped"]) == (len(LENGTHS) - bad, bad)
    assert sum(message in note for note in index.document["notes"]) == bad


def test_a_wider_tolerance_takes_the_nearest_picture_up_to_a_quarter_of_the_time_between_two(
    robot: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    _edit(copy, ROWS, _column("timestamp", lambda v: [*v[:3], v[3] + 0.02, *v[4:]]))
    index = index_lerobot(str(copy), str(tmp_path / "wide"), IndexOptions(tolerance=0.025))
    assert index.episodes == len(LENGTHS)
    with pytest.raises(DataError, match="at most a quarter"):
        index_lerobot(str(copy), str(tmp_path / "wider"), IndexOptions(tolerance=0.026))


def test_rows_may_share_a_picture_or_leave_some_out(robot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    first = [0, 0, 0.1, 0.3, 0.4, 0.4, 0.6, 0.7, 0.8]
    _edit(copy, ROWS, _column("timestamp", lambda v: first + v[len(first) :]))
    index = index_lerobot(str(copy), str(tmp_path / "indexed"))
    pictures = read_episode(index, 0).fields[TOP]
    whole = read_episode(index_lerobot(str(robot), str(tmp_path / "plain")), 0).fields[TOP]
    assert np.array_equal(pictures, whole[[round(t * 10) for t in first]])
    assert np.array_equal(
        read_episode(index, 1).fields[TOP], read_episode(EpisodeIndex.open(str(tmp_path / "plain")), 1).fields[TOP]
    )


def test_a_video_path_may_not_leave_the_source(robot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    info = json.loads((copy / "meta/info.json").read_text())
    for path in ("../secret.mp4", "file:///etc/passwd", "http://host/x.mp4", "/etc/passwd"):
        (copy / "meta/info.json").write_text(json.dumps(info | {"video_path": path}))
        with pytest.raises(DataError, match="leads out of the source"):
            index_lerobot(str(copy), str(tmp_path / "indexed"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "image"}, "lie inside Parquet"),
        ({"info": {"video.is_depth_map": True}}, "depth video"),
    ],
)
def test_pictures_that_cannot_stay_are_refused_with_the_way_out(
    change: dict[str, Any], message: str, robot: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"][TOP] |= change
    (copy / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=f"{message}.*tiphys convert"):
        index_lerobot(str(copy), str(tmp_path / "indexed"))


def test_a_raw_folder_is_indexed_once_and_then_opened_like_a_dataset(robot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    with pytest.raises(FileNotFoundError, match="tiphys index"):
        EpisodeIndex.open(str(copy))
    assert f"the rows of {len(LENGTHS)} episodes" in cost_line(str(copy))
    place = prepare(str(copy))
    assert place == location(str(copy)) == str(tmp_path / "robot.tiphys")
    made = EpisodeIndex.open(str(copy))
    assert prepare(str(copy)) == prepare(place) == place
    assert EpisodeIndex.open(place).fingerprint == made.fingerprint
    file = copy / f"videos/{TOP}/chunk-000/file-002.mp4"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DataError, match="has changed since its index was made"):
        prepare(str(copy))


def test_a_decoder_that_crashes_costs_its_episode_and_not_the_run(
    indexed: EpisodeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = 4
    table = indexed.packets(TOP)
    assert table is not None
    first = int(table.first[deadly]) + 1  # the first chunk may hold pictures of the episode before it
    before = int(table.samples[int(table.first[deadly]) : first].sum())
    sizes = table.part("sample_size", deadly, before, 1)
    assert sizes is not None
    place = Range(int(table.shard[deadly]), int(table.offset[first]), int(sizes[0]), TOP)
    (sample,) = indexed.read([place])
    reference = batches(indexed, stop=2)
    monkeypatch.setenv(crashing.CRASH, str(crc32c(sample)))
    found = batches(indexed, stop=2, make_batch=crashing.make_batch)
    events = found[None]
    assert {event["id"] for event in events} == {indexed.id(deadly)}
    assert f"by signal {signal.SIGSEGV:d}" in events[0]["reason"]
    assert TOP in events[0]["reason"]
    assert found.keys() == reference.keys()
    assert 0 < sum(found[key] == reference[key] for key in reference) < len(reference)


def test_verify_compares_videos_with_the_index_and_can_decode_them(robot: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(robot, tmp_path / "robot"))
    url = index_lerobot(str(copy), str(tmp_path / "indexed")).url
    found = verify(url, full=True)
    assert found.ok
    assert any("video bytes unverified" in note for note in found.notes)
    checked = index_lerobot(str(copy), str(tmp_path / "checked"), IndexOptions(crc=True)).url
    file = copy / f"videos/{TOP}/chunk-000/file-002.mp4"
    good, index = file.read_bytes(), EpisodeIndex.open(url)
    table = index.packets(TOP)
    assert table is not None
    damaged = bytearray(good)
    at = int(table.offset[table.first[6]])
    damaged[at : at + 200] = bytes(200)
    file.write_bytes(damaged)
    assert {f.kind for f in verify(checked).findings} == {"checksum"}
    assert verify(url).ok
    assert not verify(url, full=True).ok
    file.write_bytes(good[:-1])
    assert {f.kind for f in verify(url).findings} == {"truncated"}
    file.unlink()
    assert [f.kind for f in verify(url, repair=True).findings] == ["missing"]
    assert EpisodeIndex.open(url).episodes == 5
    assert verify(url).ok


def test_inspect_says_what_videos_are_and_what_reading_them_costs(
    indexed: EpisodeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspect(indexed.url)["videos"][TOP]
    assert (found["codecs"], found["sizes"], found["files"], found["checked"]) == (["h264"], ["64×64"], 3, True)
    assert max(map(int, found["groups"])) <= 10
    long = index_lerobot(str(source(tmp_path / "long", gop=250)), str(tmp_path / "indexed"))
    more = inspect(long.url)["videos"][TOP]
    assert more["decoded"]["1"] > 2 * found["decoded"]["1"]
    assert found["decoded"]["8"] < found["decoded"]["1"]
    assert any("unverified" in line for line in summary.lines({TOP: more}))
    monkeypatch.setattr(summary, "MOST_DECODED", 5.0)
    monkeypatch.setattr(summary, "SHORT", 4)  # x264 begins a group at each change of the scene
    assert summary.warnings(indexed, [TOP, "action"], 8) == []
    (line,) = summary.warnings(long, [TOP, "action"], 1)
    assert f"{sum(LENGTHS)} pictures anew" in line
    table = long.packets(TOP)
    assert table is not None
    now, then = summary.short_groups(table, sum(LENGTHS))
    assert now < then < 4 * now
    assert f"about {then / 2**20:,.1f} MiB instead of {now / 2**20:,.1f} MiB" in line
