"""ShardWriter writes plain WebDataset tars with exact offsets and the same bytes each time, and leaves no partial dataset."""

import errno
import io
import json
import os
import resource
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataio.making import (
    CAPTION,
    RICH,
    SMALL,
    assert_equal_fields,
    observed,
    random_episode,
    read_window,
    small_dataset,
    write,
)
from tiphys.dataio.dataset import read_episode, verify
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.format.rows import ONLY_WITH_ACTION, row_dtype
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter, merge_pieces
from tiphys.dataio.storage import Store


def rich_episodes(count=8, seed=0):
    rng = np.random.default_rng(seed)
    return [random_episode(RICH, f"r{i}", int(rng.integers(1, 9)), rng, observed(RICH)) for i in range(count)]


def test_the_webdataset_library_reads_the_shards(tmp_path):
    import webdataset

    episodes = rich_episodes()
    write(str(tmp_path / "d"), episodes, [RICH], shard_bytes=100 << 10)
    shards = sorted(str(p) for p in (tmp_path / "d/shards").iterdir())
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert len(samples) == len(episodes)
    for sample, e in zip(samples, episodes):
        assert (sample["json"]["id"], sample["json"]["steps"]) == (e.id, e.steps)
        assert sample["json"]["fields"]["mission"] == e.fields["mission"]
        rows = sample["steps.npy"]
        assert rows.dtype == row_dtype(RICH)
        assert np.array_equal(rows["observation.state"], e.fields["observation.state"])
        assert np.array_equal(sample["observation.depth.npy"], e.fields["observation.depth"])
        assert sample["speech.json"] == list(e.fields["speech"])
        for t, frame in enumerate(e.fields["observation.image"]):
            assert np.array_equal(sample[f"observation.image.{t:04d}.webp"], frame)


def test_offsets_equal_those_that_tarfile_finds(tmp_path):
    episodes = rich_episodes()
    index = write(str(tmp_path / "d"), episodes, [RICH], shard_bytes=100 << 10)
    names = [f.name for f in RICH.fields]
    for e in range(index.episodes):
        with tarfile.open(tmp_path / "d" / index.shard_name(int(index.shard[e]))) as tar:
            members = tar.getmembers()
            mine = [m for m in members if json.loads(_sibling(tar, m))["id"] == index.id(e)]
            places = {m.name.split(".", 1)[1]: (m.offset_data, m.size) for m in mine}
            steps, *large = index.ranges(e, 0, int(index.rows[e]), names)
            assert steps.offset + steps.size == sum(places["steps.npy"])
            assert index.json_range(e) == places["json"]
            assert min(m.offset for m in mine) == index.sample_range(e)[0]
            for r in large:
                own = [p for n, p in places.items() if n.startswith(f"{r.field}.")]
                assert min(o for o, _ in own) <= r.offset
                assert r.offset + r.size in {o + s for o, s in own} | {
                    o + s - 1 for o, s in own
                }  # -1: without the list's ]


def _sibling(tar, member):
    return tar.extractfile(member.name.split(".", 1)[0] + ".json").read()


def test_the_same_episodes_give_the_same_bytes(tmp_path):
    for name in "ab":
        write(str(tmp_path / name), rich_episodes(), [RICH], shard_bytes=100 << 10)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def _files(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def any_task(draw):
    fields = [FieldSpec("reward", "reward", "continuous", "float32")]
    shapes = st.sampled_from([(), (3,), (2, 2)])
    for i in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(["float32", "float64", "int64", "uint8", "bool"]))
        fields.append(FieldSpec(f"observation.v{i}", "observation", "continuous", dtype, draw(shapes)))
    if draw(st.booleans()):
        fields.append(FieldSpec("action", "action", "discrete", "int32", draw(shapes), values=9))
    if draw(st.booleans()):
        fields.append(FieldSpec("plan", "action", "continuous", "float32", (1100,)))  # over 4 KiB a step
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(5, 4, 3), (3, 5, 4), (6, 5), (4, 6, 5)]))
        fields.append(FieldSpec("observation.image", "observation", "image", "uint8", shape))
    if draw(st.booleans()):
        fields.append(FieldSpec("speech", "text", "text", "str"))
    if draw(st.booleans()):
        fields.append(FieldSpec("mission", "text", "text", "str", per="episode"))
    if draw(st.booleans()):
        fields.append(FieldSpec("goal", "info", "continuous", "float64", draw(shapes), per="episode"))
    if draw(st.booleans()):
        fields.append(FieldSpec("map", "info", "image", "uint8", (4, 7, 3), per="episode"))
    return TaskSpec("any", tuple(fields))


@st.composite
def any_dataset(draw):
    task = any_task(draw)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    episodes = []
    for i in range(draw(st.integers(1, 3))):
        extra = draw(st.sets(st.sampled_from(observed(task)))) if observed(task) else ()
        episodes.append(random_episode(task, f"e{i}", draw(st.integers(0, 6)), rng, tuple(extra)))
    kinds = st.sampled_from([Encoding("png", 2), Encoding("webp", 1), Encoding("raw", 3)])
    encodings = {"*image": draw(kinds), "plan": Encoding("raw", draw(st.integers(1, 4)))}
    return task, episodes, encodings


@given(any_dataset(), st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_window_of_any_episode_equals_the_slices_that_were_written(tmp_path_factory, dataset, data):
    task, episodes, encodings = dataset
    index = write(str(tmp_path_factory.mktemp("d") / "d"), episodes, [task], encodings=encodings)
    names = [f.name for f in task.fields]
    for e, episode in enumerate(episodes):
        rows = int(index.rows[e])
        longest = max([len(episode.fields[n]) for n in observed(task)], default=0)
        assert rows == max(longest, episode.steps, 1)
        start = data.draw(st.integers(0, rows - 1))
        count = data.draw(st.integers(1, rows + 2))
        window = read_window(index, e, start, count, names)
        count = min(count, rows - start)
        assert window["step"].tolist() == list(range(start, start + count))
        assert window["valid"].tolist() == [t < episode.steps for t in range(start, start + count)]
        rewards = episode.fields["reward"].astype(np.float64)
        for t, value in zip(window["step"], window["returns_to_go"]):
            assert value == pytest.approx(rewards[t:].sum(), abs=1e-5)
        for field in task.fields:
            got = window["fields"][field.name]
            if field.per == "episode":
                assert np.array_equal(got, episode.fields[field.name])
                continue
            wanted = episode.fields[field.name][start : start + count]
            assert len(got) == count
            assert np.array_equal(got[: len(wanted)], wanted)
            if len(wanted) < count:  # only a row without an action may have no value
                assert field.role in ONLY_WITH_ACTION or len(episode.fields[field.name]) == episode.steps
                assert not np.any(got[len(wanted) :])
        whole = read_episode(index, e)
        assert (whole.id, whole.steps, whole.success, whole.agent) == (
            episode.id, episode.steps, episode.success, episode.agent,
        )  # fmt: skip
        assert whole.info == episode.info
        assert_equal_fields(whole.fields, episode.fields)


def test_a_captioned_image_is_an_episode_without_actions(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 5, 9, 3), np.uint8)
    index = write(str(tmp_path / "d"), [Episode("c", "captions", {"image": image, "text": "a cat"}, 0)], [CAPTION])
    window = read_window(index, 0, 0, 1, ["image", "text"])
    assert np.array_equal(window["fields"]["image"], image)
    assert window["fields"]["text"] == "a cat"
    assert window["valid"].tolist() == [False]


def test_lossy_and_video_encodings_of_a_window_across_chunks(tmp_path):
    task = TaskSpec("v", (FieldSpec("image", "observation", "image", "uint8", (48, 64, 3)),))
    t, y, x = np.ogrid[:20, :48, :64]
    frames = np.stack([(128 + 90 * np.sin((x + y + 3 * t) * 0.1 + c)).astype(np.uint8) for c in range(3)], -1)
    for kind in ("h264", "av1", "jpeg", "webp-lossy"):
        url = str(tmp_path / kind)
        index = write(url, [Episode("e", "v", {"image": frames}, 20)], [task], encodings={"*": Encoding(kind, 8, 90)})
        got = read_window(index, 0, 6, 12, ["image"])["fields"]["image"]
        assert np.abs(got.astype(int) - frames[6:18]).mean() < 6
        assert np.abs(got.astype(int) - frames[8:20]).mean() > 10  # not the neighbours of the requested frames


def test_a_refused_episode_leaves_no_trace(tmp_path):
    url = str(tmp_path / "d")
    rng = np.random.default_rng(0)
    good = [random_episode(SMALL, f"e{i}", 4, rng) for i in range(3)]
    bad = [
        Episode("b", "small", {**good[0].fields, "action": np.zeros(4, np.int64)}, 4),
        Episode("b", "small", {**good[0].fields, "more": np.zeros(4)}, 4),
        Episode("b", "other", good[0].fields, 4),
        Episode("", "small", good[0].fields, 4),
        Episode("b", "small", good[0].fields, 4, info={"x": object()}),
        Episode("b", "small", {**good[0].fields, "observation": np.float32(1)}, 4),
        Episode("b", "small", {**good[0].fields, "mission": "\ud800"}, 4),
    ]
    with ShardWriter(url, [SMALL]) as writer:
        for b in bad:
            with pytest.raises(DataError):
                writer.write(b)
        for e in good:
            writer.write(e)
    assert [EpisodeIndex.open(url).id(i) for i in range(3)] == ["e0", "e1", "e2"]


def test_there_is_no_dataset_before_close_and_scratch_is_removed(tmp_path):
    url, scratch = str(tmp_path / "d"), tmp_path / "scratch"
    scratch.mkdir()
    rng = np.random.default_rng(0)

    def interrupted():
        with ShardWriter(url, [SMALL], shard_bytes=4 << 10, scratch=str(scratch)) as writer:
            for i in range(20):
                writer.write(random_episode(SMALL, f"e{i}", 9, rng))
                assert not (tmp_path / "d/dataset.json").exists()
                assert not (tmp_path / "d/index.parquet").exists()
            assert list((tmp_path / "d/shards").iterdir())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not (tmp_path / "d/dataset.json").exists()
    assert not list(scratch.iterdir())
    with pytest.raises(FileNotFoundError):
        EpisodeIndex.open(url)
    small_dataset(url)  # the folder can be used again
    assert EpisodeIndex.open(url).episodes == 30


def test_an_existing_dataset_is_not_overwritten(tmp_path):
    small_dataset(str(tmp_path / "d"))
    with pytest.raises(FileExistsError):
        ShardWriter(str(tmp_path / "d"), [SMALL])


def _die_after(call, url):
    """For a forked child: write a dataset, and exit without any cleanup right after upload number `call`."""
    done = 0

    def dying(name, original=Store):
        method = getattr(original, name)

        def wrapped(*args):
            nonlocal done
            method(*args)
            done += 1
            if done == call:
                os._exit(9)

        return wrapped

    Store.upload, Store.write = dying("upload"), dying("write")
    rng = np.random.default_rng(0)
    write(url, [random_episode(SMALL, f"e{i}", 9, rng) for i in range(16)], [SMALL], shard_bytes=8 << 10)
    os._exit(0)


def test_a_writer_killed_after_any_upload_leaves_no_dataset_or_a_whole_one(tmp_path):
    import webdataset  # noqa: F401  (imported once, not in each child)

    for call in range(1, 40):
        url = str(tmp_path / f"d{call}")
        child = os.fork()
        if not child:
            try:
                _die_after(call, url)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if Path(url, "dataset.json").exists():
            assert verify(url).ok
            assert EpisodeIndex.open(url).episodes == 16
            break
        with pytest.raises(FileNotFoundError):
            EpisodeIndex.open(url)
    assert call > 4


def test_a_full_disk_gives_one_clear_error(tmp_path):
    """A limit of file sizes stands for a full disk: it fails in the same place, with EFBIG."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    episodes = [random_episode(RICH, f"r{i}", 20, rng) for i in range(4)]
    import webdataset  # noqa: F401  (its import may write caches)

    try:
        writer = ShardWriter(str(tmp_path / "d"), [RICH])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, limits[1]))
        with pytest.raises(OSError, match="no space left while writing") as caught:
            _write_all(writer, episodes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path).rglob("dataset.json"))


def _write_all(writer, episodes):
    with writer:
        for episode in episodes:
            writer.write(episode)


def test_tasks_may_be_added_while_writing(tmp_path):
    rng = np.random.default_rng(0)
    url = str(tmp_path / "d")
    episodes = [
        random_episode(SMALL, "a", 3, rng),
        random_episode(RICH, "b", 3, rng),
        random_episode(SMALL, "c", 2, rng),
    ]
    with ShardWriter(url) as writer:
        writer.add_task(SMALL)
        writer.write(episodes[0])
        writer.add_task(RICH)
        writer.add_task(SMALL)  # adding the same task again has no effect
        for e in episodes[1:]:
            writer.write(e)
        with pytest.raises(DataError, match="declared twice"):
            writer.add_task(TaskSpec("small", SMALL.fields[:2]))
    index = EpisodeIndex.open(url)
    assert [t.name for t in index.tasks] == ["small", "rich"]
    for i, e in enumerate(episodes):
        assert_equal_fields(read_episode(index, i).fields, e.fields)


def test_numpy_scalars_are_stored_as_numbers(tmp_path):
    low, high = np.float32([-1, -1]), np.float32([1, 1])
    fields = [FieldSpec("x", "action", "continuous", "float32", tuple(np.array([2])), low, high)]
    rng = np.random.default_rng(0)
    episode = random_episode(TaskSpec("n", tuple(fields)), "e", 3, rng)
    episode = Episode("e", "n", episode.fields, np.int64(3), np.True_, info={"seed": np.int64(7), "x": np.float32(0.5)})
    index = write(str(tmp_path / "d"), [episode], [TaskSpec("n", tuple(fields))])
    assert index.tasks[0].fields[0].high == (1.0, 1.0)
    assert read_episode(index, 0).info == {"seed": 7, "x": 0.5}
    assert read_episode(index, 0).success is True


def pieces(url, order, count=3):
    for p in order:
        rng = np.random.default_rng(p)
        tasks = [SMALL, RICH][: 1 + p % 2]
        with ShardWriter(url, tasks, piece=f"part-{p}", shard_bytes=16 << 10) as writer:
            for i in range(count):
                writer.write(random_episode(tasks[-1], f"p{p}-{i}", 5, rng))


def test_pieces_written_in_any_order_or_twice_give_the_same_dataset(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    pieces(a, [0, 1, 2])
    pieces(b, [2, 0, 1, 0, 2])
    with pytest.raises(FileNotFoundError):
        EpisodeIndex.open(a)
    index = merge_pieces(a)
    merge_pieces(b)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert [index.id(i) for i in range(index.episodes)] == [f"p{p}-{i}" for p in range(3) for i in range(3)]
    assert read_episode(index, 4).fields["observation.image"].shape == (5, 8, 6, 3)
    with pytest.raises(FileNotFoundError):
        merge_pieces(a, ["part-0", "part-9"])


def test_pieces_have_the_statistics_of_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [random_episode(SMALL, f"e{i}", 7, rng) for i in range(12)]
    whole = write(str(tmp_path / "whole"), episodes, [SMALL]).statistics["small"]
    for p in range(3):
        with ShardWriter(str(tmp_path / "parts"), [SMALL], piece=f"p{p}") as writer:
            for e in episodes[p * 4 : p * 4 + 4]:
                writer.write(e)
            part = writer.close()
            assert part.episodes == 4
            assert part.statistics["small"]["reward"].count == 28
    parts = merge_pieces(str(tmp_path / "parts")).statistics["small"]
    assert parts.keys() == whole.keys()
    for name, s in whole.items():
        assert parts[name].count == s.count
        assert np.array_equal(parts[name].quantiles, s.quantiles)
        assert np.allclose(parts[name].mean, s.mean, rtol=1e-13, atol=1e-15)
        assert np.allclose(parts[name].std, s.std, rtol=1e-13)


def test_members_are_plain_files_without_time_or_owner(tmp_path):
    index = small_dataset(str(tmp_path / "d"), 3)[1]
    with tarfile.open(tmp_path / "d" / index.shard_name(0)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode, member.isreg()) == (0, 0, 0, 0o644, True)
            if member.name.endswith(".npy"):
                np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
