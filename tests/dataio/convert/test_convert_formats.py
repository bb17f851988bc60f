"""Each reader finds exactly the episodes that were written with the format's own library, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.convert_sources import MAKERS
from tiphys.dataio.convert.converter import BUILT_IN, BadEpisode, Converter, converters, load_converter, recognise
from tiphys.dataio.convert.infer import conform
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import Episode


def reader(url: Path, format: str, **options: Any) -> Converter:
    return load_converter(BUILT_IN[format])(Source(str(url)), options)


def read_all(converter: Converter) -> dict[str, Episode]:
    """Every episode of every piece, as its task says; fails at a bad one."""
    tasks, out = {t.name: t for t in converter.tasks()}, {}
    for piece in converter.pieces():
        for item in converter.episodes(piece):
            assert not isinstance(item, BadEpisode), item
            assert item.id not in out
            out[item.id] = conform(item, tasks[item.task], item.id)
    return out


def assert_same(found: Any, wanted: Any, name: str) -> None:
    if isinstance(wanted, str):
        assert found == wanted, name
        return
    wanted = np.asarray(wanted)
    if wanted.dtype == object:
        assert np.asarray(found).tolist() == wanted.tolist(), name
        return
    assert np.asarray(found).shape == wanted.shape, name
    np.testing.assert_array_equal(np.asarray(found), wanted, err_msg=name)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_reads_what_was_written(made: Any, name: str) -> None:
    source, format, expected = made(name)
    found = read_all(reader(source, format))
    assert sorted(found) == sorted(expected)
    for key, (steps, fields) in expected.items():
        episode = found[key]
        assert episode.steps == steps
        assert sorted(episode.fields) == sorted(fields)
        for field, wanted in fields.items():
            assert_same(episode.fields[field], wanted, f"{key} {field}")


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_is_recognised_and_passes_over(made: Any, name: str) -> None:
    source, format, _ = made(name)
    assert recognise(Source(str(source)), converters()) == format
    converter = reader(source, format)
    piece = converter.pieces()[0]
    whole = [i.id for i in converter.episodes(piece) if isinstance(i, Episode)]
    rest = [i.id for i in converter.episodes(piece, start=1) if isinstance(i, Episode)]
    assert rest == whole[1:]


def test_roles_and_modalities(made: Any) -> None:
    task = reader(made("lerobot-v2")[0], "lerobot").tasks()[0]
    said = {f.name: (f.role, f.modality, f.shape, f.per) for f in task.fields}
    assert said == {
        "observation.state": ("observation", "continuous", (3,), "step"),
        "action": ("action", "continuous", (2,), "step"),
        "observation.images.top": ("observation", "image", (64, 64, 3), "step"),
        "reward": ("reward", "continuous", (), "step"),
        "terminated": ("terminated", "discrete", (), "step"),
        "instruction": ("text", "text", (), "episode"),
    }


def test_spaces_give_bounds_and_values(made: Any) -> None:
    task = reader(made("minari-hdf5")[0], "minari").tasks()[0]
    assert task.field("action.0").values == 4
    assert task.field("action.1").low == (-2.0,)
    assert task.field("action.1").high == (2.0,)
    assert task.field("observation.pair.0").modality == "discrete"
    assert task.field("observation.mission").role == "text"
    assert task.field("observation.image").modality == "image"


def test_depth_pictures_of_rlds() -> None:
    """TFDS writes a float32 picture of one channel as the four bytes of each number, in a PNG."""
    from tests.dataio.convert.convert_sources import picture
    from tiphys.dataio.convert.rlds import _images
    from tiphys.dataio.convert.tfds import Feature

    depth = np.random.default_rng(0).normal(size=(2, 16, 18, 1)).astype(np.float32)
    data = [picture(d.view(np.uint8)) for d in depth]
    np.testing.assert_array_equal(_images(data, Feature("steps/depth", "image", "float32", (16, 18, 1)), "x"), depth)
    black = _images([data[0], b""], Feature("steps/depth", "image", "float32", (16, 18, 1)), "x")
    assert not black[1].any()


def test_minari_names_its_environment(made: Any, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(made("minari-hdf5")[0], tmp_path / "m")
    path = next((tmp_path / "m").rglob("data/metadata.json"))
    known = json.loads(path.read_text())

    def environment(**spec: Any) -> tuple[str, int]:
        path.write_text(json.dumps({**known, "env_spec": json.dumps(spec), "ref_min_score": 1, "ref_max_score": 9}))
        task = reader(tmp_path / "m", "minari").tasks()[0]
        assert (task.random, task.expert) == (1.0, 9.0)
        return task.environment, task.max_steps

    assert environment(id="CartPole-v1", max_episode_steps=500, kwargs={}) == ("CartPole-v1", 500)
    assert environment(id="evil_module:CartPole-v1", kwargs={}) == ("", 0)
    assert environment(id="CartPole-v1", kwargs={"gravity": 1}) == ("", 0)


def test_av1_video(tmp_path: Path) -> None:
    from tests.dataio.convert.convert_sources import lerobot_v2

    expected = lerobot_v2(tmp_path / "av1", "libsvtav1")
    found = read_all(reader(tmp_path / "av1", "lerobot"))
    for key, (_, fields) in expected.items():
        assert_same(found[key].fields["observation.images.top"], fields["observation.images.top"], key)


def test_videos_are_searched_not_only_read_forward(made: Any) -> None:
    """Each episode of a v3 source alone, in reverse, as when a reader died: the frames are those of its own rows."""
    source, format, expected = made("lerobot-v3")
    for number in reversed(range(len(expected))):
        converter = reader(source, format)
        items = [i for p in converter.pieces() for i in converter.episodes(p)]
        key = sorted(expected)[number]
        found = next(i for i in items if isinstance(i, Episode) and i.id == key)
        assert_same(found.fields["observation.images.top"], expected[key][1]["observation.images.top"], key)
    converter = reader(source, format)
    last = [i for p in converter.pieces()[:1] for i in converter.episodes(p, start=1)]
    key = sorted(expected)[1]
    assert isinstance(last[0], Episode)
    assert_same(last[0].fields["observation.images.top"], expected[key][1]["observation.images.top"], key)


def test_options(made: Any) -> None:
    source = made("dqn-replay")[0]
    stacked = read_all(reader(source, "dqn-replay", stack=4))
    single = read_all(reader(source, "dqn-replay"))
    for key, episode in stacked.items():
        frames = episode.fields["observation.image"]
        assert frames.shape[1:] == (84, 84, 4)
        np.testing.assert_array_equal(frames[..., 3], single[key].fields["observation.image"][..., 0])
        np.testing.assert_array_equal(frames[1:, ..., 2], single[key].fields["observation.image"][:-1, ..., 0])
        assert not frames[0, ..., :3].any()
    source = made("robomimic")[0]
    assert sorted(read_all(reader(source, "robomimic", mask="train"))) == ["Lift/demo_0", "Lift/demo_10"]
    assert read_all(reader(source, "robomimic"))["Lift/demo_2"].info == {"masks": ["valid"]}
    source = made("rlds")[0]
    short = read_all(reader(source, "rlds", last_step="observation"))
    for key, (steps, fields) in made("rlds")[2].items():
        assert short[key].steps == steps - 1
        assert_same(short[key].fields["observation.state"], fields["observation.state"], key)
        assert_same(short[key].fields["action"], fields["action"][:-1], key)
        assert bool(short[key].fields["terminated"][-1]) == bool(fields["terminated"][-1])
    source = made("vpt")[0]
    cut = read_all(reader(source, "vpt", segment=2, resize=[32, 16]))
    assert sum(e.steps for e in cut.values()) == sum(s for s, _ in made("vpt")[2].values())
    assert all(e.fields["observation.image"].shape[1:] == (32, 16, 3) for e in cut.values())


def test_d4rl_without_timeouts(tmp_path: Path) -> None:
    """The end of an episode shows where the next observation is not the next row's."""
    import h5py

    from tests.dataio.convert.convert_sources import d4rl

    expected = d4rl(tmp_path / "d")
    with h5py.File(tmp_path / "d/hopper.hdf5", "a") as file:
        del file["timeouts"]
    found = read_all(reader(tmp_path / "d", "d4rl"))
    assert {k: e.steps for k, e in found.items()} == {k: s for k, (s, _) in expected.items()}
    with h5py.File(tmp_path / "d/hopper.hdf5", "a") as file:
        del file["next_observations"]
    found = read_all(reader(tmp_path / "d", "d4rl", max_steps=4))
    assert [e.steps for e in found.values()] == [4, 1, 4, 3]


def test_zarr_3(tmp_path: Path) -> None:
    from tests.dataio.convert.convert_sources import zarr_buffer

    expected = zarr_buffer(tmp_path / "b.zarr", zarr_format=3)
    found = read_all(reader(tmp_path / "b.zarr", "zarr"))
    for key, (_, fields) in expected.items():
        for name, wanted in fields.items():
            assert_same(found[key].fields[name], wanted, key)


def test_text_that_changes_by_step(tmp_path: Path) -> None:
    folder = tmp_path / "talk"
    folder.mkdir()
    for number in range(2):
        np.savez(folder / f"{number}.npz", actions=np.arange(3), instruction=np.array(["a", "b", f"c{number}"]))
    converter = reader(folder, "npz")
    assert converter.tasks()[0].field("instruction").per == "step"
    found = read_all(converter)
    assert found["talk/1"].fields["instruction"].tolist() == ["a", "b", "c1"]


def test_a_source_of_no_known_format(tmp_path: Path) -> None:
    from tiphys.dataio.episode import DataError

    (tmp_path / "x.bin").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"none of the known formats.*--from"):
        recognise(Source(str(tmp_path)), converters())
    with pytest.raises(DataError, match="no such file"):
        Source(str(tmp_path / "missing"))
