"""Each converter reads exactly the episodes that were written in its format, mostly by the format's own library."""

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
    """Every episode of every piece, conformed to its task. Fails on a malformed episode."""
    tasks, out = {t.name: t for t in converter.tasks()}, {}
    for piece in converter.pieces():
        for item in converter.episodes(piece):
            assert not isinstance(item, BadEpisode), item
            assert item.id not in out
            out[item.id] = conform(item, tasks[item.task], item.id)
    return out


def assert_same(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, str):
        assert found == expected, name
        return
    expected = np.asarray(expected)
    if expected.dtype == object:
        assert np.asarray(found).tolist() == expected.tolist(), name
        return
    assert np.asarray(found).shape == expected.shape, name
    np.testing.assert_array_equal(np.asarray(found), expected, err_msg=name)


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
def test_format_is_recognised_and_start_skips_items(made: Any, name: str) -> None:
    source, format, _ = made(name)
    assert recognise(Source(str(source)), converters()) == format
    converter = reader(source, format)
    piece = converter.pieces()[0]
    whole = [i.id for i in converter.episodes(piece) if isinstance(i, Episode)]
    rest = [i.id for i in converter.episodes(piece, start=1) if isinstance(i, Episode)]
    assert rest == whole[1:]


def test_roles_and_modalities(made: Any) -> None:
    task = reader(made("lerobot-v2")[0], "lerobot").tasks()[0]
    found = {f.name: (f.role, f.modality, f.shape, f.per) for f in task.fields}
    assert found == {
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


def test_depth_images_of_rlds() -> None:
    """TFDS stores a float32 depth image as a PNG whose four channels are the bytes of each number."""
    from tests.dataio.convert.convert_sources import picture
    from tiphys.dataio.convert.rlds_values import _images
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


def test_frames_match_their_rows_if_reading_starts_late(made: Any) -> None:
    """A new reader that starts at a later episode of a shared video file, as after a crash, finds that episode's frames."""
    source, format, expected = made("lerobot-v3")
    camera = "observation.images.top"
    for piece in reader(source, format).pieces():
        for start in range(piece.data["count"]):
            episode = next(reader(source, format).episodes(piece, start))
            assert isinstance(episode, Episode)
            assert_same(episode.fields[camera], expected[episode.id][1][camera], episode.id)


def test_dqn_replay_option_stack(made: Any) -> None:
    source = made("dqn-replay")[0]
    stacked = read_all(reader(source, "dqn-replay", stack=4))
    single = read_all(reader(source, "dqn-replay"))
    for key, episode in stacked.items():
        frames = episode.fields["observation.image"]
        assert frames.shape[1:] == (84, 84, 4)
        np.testing.assert_array_equal(frames[..., 3], single[key].fields["observation.image"][..., 0])
        np.testing.assert_array_equal(frames[1:, ..., 2], single[key].fields["observation.image"][:-1, ..., 0])
        assert not frames[0, ..., :3].any()


def test_robomimic_option_mask(made: Any) -> None:
    source = made("robomimic")[0]
    assert sorted(read_all(reader(source, "robomimic", mask="train"))) == ["Lift/demo_0", "Lift/demo_10"]
    assert read_all(reader(source, "robomimic"))["Lift/demo_2"].info == {"masks": ["valid"]}


def test_rlds_option_last_step(made: Any) -> None:
    source = made("rlds")[0]
    short = read_all(reader(source, "rlds", last_step="observation"))
    for key, (steps, fields) in made("rlds")[2].items():
        assert short[key].steps == steps - 1
        assert_same(short[key].fields["observation.state"], fields["observation.state"], key)
        assert_same(short[key].fields["action"], fields["action"][:-1], key)
        assert bool(short[key].fields["terminated"][-1]) == bool(fields["terminated"][-1])


def test_vpt_options_segment_and_resize(made: Any) -> None:
    source = made("vpt")[0]
    segments = read_all(reader(source, "vpt", segment=2, resize=[32, 16]))
    assert sum(e.steps for e in segments.values()) == sum(s for s, _ in made("vpt")[2].values())
    assert all(e.fields["observation.image"].shape[1:] == (32, 16, 3) for e in segments.values())


def test_d4rl_without_timeouts(tmp_path: Path) -> None:
    """An episode ends if its next observation differs from the next row. Without next observations, `max_steps` splits."""
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


def test_a_source_of_unknown_format_is_an_error(tmp_path: Path) -> None:
    from tiphys.dataio.episode import DataError

    (tmp_path / "x.bin").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"none of the known formats.*--from"):
        recognise(Source(str(tmp_path)), converters())
    with pytest.raises(DataError, match="no such file"):
        Source(str(tmp_path / "missing"))
