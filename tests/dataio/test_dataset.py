"""Whole datasets: damage is found and repaired without changing a shard, and datasets made of datasets copy nothing."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dataio.making import (
    RICH,
    SMALL,
    assert_equal_fields,
    observed,
    random_episode,
    read_window,
    small_dataset,
    write,
)
from tiphys.dataio.dataset import append, filter, index_foreign, inspect, merge, read_episode, split, verify
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter


@pytest.fixture
def rich(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [random_episode(RICH, f"r{i}", int(rng.integers(1, 6)), rng, observed(RICH)) for i in range(12)]
    url = str(tmp_path / "rich")
    return url, episodes, write(url, episodes, [RICH], shard_bytes=150 << 10)


def shards(url):
    return {p.name: p.read_bytes() for p in sorted(Path(url, "shards").iterdir())}


def flip(url, shard, at):
    file = Path(url, shard)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def assert_repaired(url, lost):
    """Repair the dataset: the episodes that are not in `lost` are still there, and the shards are unchanged."""
    before = shards(url)
    old = {i: EpisodeIndex.open(url).id(i) for i in range(EpisodeIndex.open(url).episodes)}
    report = verify(url, repair=True)
    assert not report.ok
    assert report.repairs
    assert shards(url) == before
    again = verify(url)
    assert again.ok, again.findings
    index = EpisodeIndex.open(url)
    assert [index.id(i) for i in range(index.episodes)] == [i for i in old.values() if i not in lost]
    assert {q["id"] for q in index.document["quarantine"]} == set(lost)
    for i in range(index.episodes):
        read_episode(index, i)
    return index


def test_an_intact_dataset_is_ok(rich):
    report = verify(rich[0])
    assert report.ok
    assert not report.notes
    assert (report.episodes, report.shards) == (12, len(shards(rich[0])))
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


@pytest.mark.parametrize("field", ["action", "observation.image", "observation.wide", "observation.depth", "speech"])
def test_a_flipped_bit_of_data_is_one_finding_that_names_the_episode(rich, field):
    url, _, index = rich
    place = index.ranges(7, 0, 1, [field])[-1]
    flip(url, index.shard_name(place.shard), place.offset + place.size // 2)
    found = verify(url).findings
    assert [f.episode for f in found if f.episode] == ["r7"]
    assert {f.kind for f in found} == {"checksum"}
    assert {f.where for f in found} == {index.shard_name(place.shard)}
    assert "'r7'" in str(verify(url))
    index = assert_repaired(url, {"r7"})
    assert index.statistics["rich"]["reward"].count == int(index.steps.sum())  # without the lost episode


def test_a_flipped_bit_anywhere_is_found(rich):
    url, _, _ = rich
    rng = np.random.default_rng(1)
    whole = shards(url)
    for _ in range(15):
        name = sorted(whole)[int(rng.integers(len(whole)))]
        at = int(rng.integers(len(whole[name])))
        flip(url, f"shards/{name}", at)
        assert not verify(url).ok, at
        flip(url, f"shards/{name}", at)
    assert verify(url).ok


def test_a_damaged_header_removes_no_episode_whose_data_are_intact(rich):
    url, episodes, index = rich
    flip(url, index.shard_name(0), index.sample_range(1)[0] + 3)
    report = verify(url, repair=True)
    assert {f.kind for f in report.findings} == {"checksum", "structure"}
    assert not any(f.episode for f in report.findings)
    assert EpisodeIndex.open(url).episodes == 12
    assert_equal_fields(read_episode(EpisodeIndex.open(url), 1).fields, episodes[1].fields)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_episodes_in_the_missing_part_of_a_truncated_tar_are_removed(rich, share):
    url, _, index = rich
    file = Path(url, index.shard_name(1))
    size = int(file.stat().st_size * share)
    file.write_bytes(file.read_bytes()[:size])
    found = verify(url).findings
    assert found[0].kind == "truncated"
    assert f"{size} bytes" in found[0].message
    mine = np.flatnonzero(index.shard == 1)
    lost = {index.id(e) for e in mine if sum(index.sample_range(e)) > size}
    assert lost
    assert_repaired(url, lost)


def test_episodes_of_a_missing_shard_are_removed(rich):
    url, _, index = rich
    Path(url, index.shard_name(1)).unlink()
    assert [f.kind for f in verify(url).findings] == ["missing"]
    verify(url, repair=True)
    assert EpisodeIndex.open(url).episodes == int((index.shard != 1).sum())


def test_a_missing_index_is_made_again_with_the_same_bytes(rich):
    url, _, _ = rich
    file = Path(url, "index.parquet")
    before = file.read_bytes()
    file.unlink()
    assert [f.kind for f in verify(url).findings] == ["missing"]
    assert not file.exists()
    verify(url, repair=True)
    assert file.read_bytes() == before
    assert verify(url).ok


def test_a_damaged_index_is_made_again(rich):
    url, episodes, _ = rich
    file = Path(url, "index.parquet")
    before = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(5):
        data = bytearray(before)
        data[int(rng.integers(len(data)))] ^= 255
        file.write_bytes(data)
        with pytest.raises(DataError, match="verify --repair"):
            EpisodeIndex.open(url, str(Path(url).parent / "fresh"))
        assert {f.kind for f in verify(url).findings} == {"index"}
    file.write_bytes(before[:1000])
    verify(url, repair=True)
    assert verify(url).ok
    assert_equal_fields(read_episode(EpisodeIndex.open(url), 5).fields, episodes[5].fields)


def test_a_missing_dataset_json_is_made_again_from_the_index(rich):
    url = rich[0]
    file = Path(url, "dataset.json")
    before = json.loads(file.read_text())
    file.unlink()
    assert [f.kind for f in verify(url).findings] == ["missing"]
    verify(url, repair=True)
    after = json.loads(file.read_text())
    assert after.pop("quarantine") == []
    assert after["digests"] == before["digests"]
    assert after["tasks"] == before["tasks"]
    assert after["statistics"].keys() == before["statistics"].keys()
    with pytest.raises(FileNotFoundError, match="neither"):
        verify(str(Path(url).parent / "nothing"))


def test_damaged_statistics_are_made_again(rich):
    url = rich[0]
    file = Path(url, "statistics.parquet")
    before = file.read_bytes()
    for damage in (before[:-5], None):
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        assert [f.where for f in verify(url).findings] == ["statistics.parquet"]
        verify(url, repair=True)
        assert file.read_bytes() == before
        assert verify(url).ok


def test_swapped_shards_are_found(rich):
    url, _, index = rich
    a, b = Path(url, index.shard_name(0)), Path(url, index.shard_name(1))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    report = verify(url)
    assert not report.ok
    assert {f.episode for f in report.findings if f.episode}


def test_leftover_shards_and_repeated_ids_are_notes(tmp_path, monkeypatch):
    url = str(tmp_path / "d")
    monkeypatch.setattr("tiphys.dataio.format.table.check_ids", lambda *_: None)  # a dataset of an earlier version
    rng = np.random.default_rng(0)
    write(url, [random_episode(SMALL, "same", 3, rng) for _ in range(3)], [SMALL])
    Path(url, "shards/000009.tar").write_bytes(b"x")
    report = verify(url)
    assert report.ok
    assert len(report.notes) == 2


def test_merge_points_to_the_existing_shards(tmp_path, rich):
    url, rich_episodes, _ = rich
    small = str(tmp_path / "small")
    small_episodes, _ = small_dataset(small)
    index = merge([url, small], str(tmp_path / "both"))
    assert not (tmp_path / "both/shards").exists()
    for i, e in enumerate(rich_episodes + small_episodes):
        assert index.id(i) == e.id
        assert_equal_fields(read_episode(index, i).fields, e.fields)
    assert [t.name for t in index.tasks] == ["rich", "small"]
    parts = EpisodeIndex.open(url).statistics["rich"] | EpisodeIndex.open(small).statistics["small"]
    whole = index.statistics["rich"] | index.statistics["small"]
    assert all(np.array_equal(whole[n].quantiles, parts[n].quantiles) for n in whole)
    assert verify(str(tmp_path / "both")).ok
    other = str(tmp_path / "other")
    small_dataset(other, seed=1)
    merged_again = merge([str(tmp_path / "both"), other], str(tmp_path / "three"))
    assert merged_again.episodes == 12 + 30 + 30
    with pytest.raises(FileExistsError):
        merge([url], str(tmp_path / "both"))


def test_merge_refuses_two_different_tasks_of_the_same_name(tmp_path, rich):
    rng = np.random.default_rng(0)
    other = TaskSpec("rich", SMALL.fields)
    e = random_episode(SMALL, "e", 2, rng)
    write(str(tmp_path / "other"), [type(e)(**{**vars(e), "task": "rich"})], [other])
    with pytest.raises(DataError, match="'rich' has other fields"):
        merge([rich[0], str(tmp_path / "other")], str(tmp_path / "both"))


def test_two_episodes_of_one_id_are_refused(tmp_path, rich):
    """Held-out episodes and quarantine go by ids."""
    with pytest.raises(DataError, match=r"ids stand more than once, for example"):
        merge([rich[0], rich[0]], str(tmp_path / "twice"))
    assert not (tmp_path / "twice" / "dataset.json").exists()


def test_append_keeps_the_old_episodes_and_their_order(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    first, _ = small_dataset(a, 5, seed=1)
    second, _ = small_dataset(b, 4, seed=2)
    index = append(a, [b])
    for i, e in enumerate(first + second):
        assert_equal_fields(read_episode(index, i).fields, e.fields)
    assert index.shard_name(0) == "shards/000000.tar"
    assert verify(a).ok


def test_filter_selects_the_same_episodes_as_a_plain_loop(tmp_path):
    url = str(tmp_path / "d")
    episodes, _ = small_dataset(url, 60)
    cases = [
        ({"min_return": 0.5}, lambda e: np.float32(e.total_return) >= 0.5),
        ({"max_return": 0.0}, lambda e: np.float32(e.total_return) <= 0.0),
        ({"success": True}, lambda e: e.success is True),
        ({"success": True, "min_steps": 4}, lambda e: e.success is True and e.steps >= 4),
        ({"min_steps": 3, "max_steps": 6}, lambda e: 3 <= e.steps <= 6),
        ({"agents": ["*-1"]}, lambda e: e.agent == "agent-1"),
        ({"tasks": ["sm*"]}, lambda e: True),
    ]
    for i, (conditions, oracle) in enumerate(cases):
        index = filter(url, str(tmp_path / f"f{i}"), **conditions)
        wanted = [e for e in episodes if oracle(e)]
        assert [index.id(k) for k in range(index.episodes)] == [e.id for e in wanted]
        if wanted:
            assert_equal_fields(read_episode(index, 0).fields, wanted[0].fields)
        assert index.document["statistics_of_superset"] is True
    best = filter(url, str(tmp_path / "top"), top=0.2, min_steps=3)
    ranked = sorted((e for e in episodes if e.steps >= 3), key=lambda e: -e.total_return)
    assert set(best.ids) == {e.id for e in ranked[: best.episodes]}
    assert best.episodes == -(-len(ranked) // 5)
    with pytest.raises(DataError, match="'x' matches none of small"):
        filter(url, str(tmp_path / "no"), tasks=["x"])


def test_an_index_of_shards_of_other_datasets_is_not_made_again(tmp_path):
    small_dataset(str(tmp_path / "d"))
    filter(str(tmp_path / "d"), str(tmp_path / "few"), max_steps=2)
    Path(tmp_path, "few/index.parquet").unlink()
    report = verify(str(tmp_path / "few"), repair=True)
    assert "other datasets" in str(report.findings[-1])
    assert not report.repairs
    assert not Path(tmp_path, "few/index.parquet").exists()


def test_split_divides_the_episodes_by_their_ids(tmp_path):
    url = str(tmp_path / "d")
    episodes, _ = small_dataset(url, 200)
    parts = split(url, str(tmp_path / "a"), str(tmp_path / "b"), 0.25)
    ids = [set(p.ids) for p in parts]
    assert ids[0] | ids[1] == {e.id for e in episodes}
    assert not ids[0] & ids[1]
    assert 30 < len(ids[1]) < 70
    again = small_dataset(str(tmp_path / "d2"), 100)[1]
    _, second = split(str(tmp_path / "d2"), str(tmp_path / "c"), str(tmp_path / "e"), 0.25)
    assert set(second.ids) == ids[1] & set(again.ids)


def test_an_empty_dataset_is_not_written(tmp_path):
    url, out = str(tmp_path / "d"), tmp_path / "out"
    small_dataset(url, 6)
    with pytest.raises(DataError, match=r"none of its 6 episodes meets min_return=1000000\.0, min_steps=3"):
        filter(url, str(out), min_return=1e6, min_steps=3)
    for share in (0.0, 1.0):
        with pytest.raises(DataError, match=rf"with share {share}, {int(6 * share)} of 6 episodes"):
            split(url, str(out), str(tmp_path / "second"), share)
    with pytest.raises(DataError, match="nothing to merge"):
        merge([], str(out))
    ShardWriter(str(tmp_path / "empty"), [SMALL]).close()
    with pytest.raises(DataError, match="hold no episode"):
        merge([str(tmp_path / "empty")], str(out))
    folder = tmp_path / "tars"
    folder.mkdir()
    foreign_tar(folder / "x.tar", [("a", {"txt": b"no picture"})])
    with pytest.raises(DataError, match="none of the 1 samples in 1 tars has a picture"):
        index_foreign(str(folder))
    assert not (folder / "dataset.json").exists()
    assert not out.exists()
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("name", ["y.tar.gz", "y.zip"])
def test_compressed_archives_are_not_skipped_by_index(tmp_path, name):
    foreign_tar(tmp_path / "x.tar", [("a", {"jpg": picture("JPEG", (8, 8), 0)[0]})])
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name}: samples inside a compressed archive"):
        index_foreign(str(tmp_path))


def test_inspect_summarises_a_dataset(tmp_path, rich):
    summary = inspect(rich[0])
    assert summary["episodes"] == 12
    assert summary["steps"] == sum(e.steps for e in rich[1])
    assert summary["tasks"]["rich"]["lengths"]["max"] == max(e.steps for e in rich[1])
    assert sum(summary["tasks"]["rich"]["returns"]["histogram"]) == 12
    assert summary["fields"]["observation.image"]["shape"] == [8, 6, 3]
    assert summary["bytes"] == sum(map(len, shards(rich[0]).values()))
    json.dumps(summary)


def foreign_tar(file, samples):
    with tarfile.open(file, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def picture(kind, size, seed):
    array = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue(), np.asarray(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))


def test_foreign_tars_become_a_dataset_in_place(tmp_path):
    folder = tmp_path / "laion"
    folder.mkdir()
    wanted = {}
    for s in range(2):
        samples = []
        for i, (extension, kind) in enumerate([("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jpg", "PNG")]):
            data, pixels = picture(kind, (10 + i, 20 + s), i)
            caption = {"txt": f" ein Bild {i} ".encode()} if i % 2 else {"json": b'{"caption": "picture %d"}' % i}
            samples.append((f"{s:02d}{i:04d}", {extension: data, **caption}))
            wanted[f"{s:05d}/{s:02d}{i:04d}"] = (pixels, f"ein Bild {i}" if i % 2 else f"picture {i}")
        samples.append((f"{s}no", {"txt": b"no picture"}))
        foreign_tar(folder / f"{s:05d}.tar", samples)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    index = index_foreign(str(folder))
    assert {n: (folder / n).read_bytes() for n in before} == before
    assert set(index.ids) == set(wanted)
    assert index.document["skipped"] == 2
    for e in range(index.episodes):
        pixels, text = wanted[index.id(e)]
        window = read_window(index, e, 0, 1, ["image", "text"])
        assert np.array_equal(window["fields"]["image"][0], pixels)
        assert window["fields"]["text"] == text
        assert read_episode(index, e).fields["text"] == text
    assert verify(str(folder)).ok
    both = merge([str(folder)], str(tmp_path / "elsewhere"))
    assert read_window(both, 0, 0, 1, ["image"])["fields"]["image"].shape[3] == 3
    shutil.rmtree(tmp_path / "elsewhere")
    away = index_foreign(str(folder), str(tmp_path / "elsewhere"), shards=["00001.tar"])
    assert away.episodes == 4
    flip(str(folder), "00001.tar", int(away.chunk_table("image").offset[2]) + 30)
    assert [f.episode for f in verify(str(folder)).findings if f.episode] == [away.id(2)]


@pytest.mark.parametrize("fault", ["link", "cut", "gzip"])
def test_bad_foreign_tars_are_refused(tmp_path, fault):
    file = tmp_path / "x.tar"
    foreign_tar(file, [("a", {"jpg": picture("JPEG", (8, 8), 0)[0]})])
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:1024])
    elif fault == "link":
        with tarfile.open(file, "a") as tar:
            info = tarfile.TarInfo("b.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    else:
        import gzip

        file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(DataError, match=r"x\.tar"):
        index_foreign(str(tmp_path))
    assert not (tmp_path / "dataset.json").exists()


def test_a_field_of_images_may_vary_only_where_it_says_so(tmp_path):
    rng = np.random.default_rng(0)
    varies = TaskSpec("v", (FieldSpec("image", "observation", "image", "uint8", (0, 0, 3)),))
    from tiphys.dataio.episode import Episode

    images = [rng.integers(0, 256, (1, 4 + i, 6, 3), np.uint8) for i in range(3)]
    index = write(str(tmp_path / "d"), [Episode(f"{i}", "v", {"image": x}, 0) for i, x in enumerate(images)], [varies])
    for i, x in enumerate(images):
        assert np.array_equal(read_window(index, i, 0, 1, ["image"])["fields"]["image"], x)
