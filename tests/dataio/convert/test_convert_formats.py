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
from tiphys.dataio.episode import DataError, Episode


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


def test_dqn_replay_looks_at_all_checkpoints(tmp_path: Path) -> None:
    import gzip
    import io

    from tests.dataio.convert.convert_sources import dqn_replay

    dqn_replay(tmp_path / "s")
    logs = tmp_path / "s/Pong/1/replay_logs"
    data = io.BytesIO()
    np.save(data, np.full(12, 9, np.int32))
    for kind in ("observation", "action", "reward", "terminal"):
        (logs / f"$store$_{kind}_ckpt.1.gz").rename(logs / f"$store$_{kind}_ckpt.3.gz")
    (logs / "$store$_action_ckpt.3.gz").write_bytes(gzip.compress(data.getvalue()))
    converter = reader(tmp_path / "s", "dqn-replay")
    assert converter.tasks()[0].field("action").values == 10
    assert converter.notes() == ["Pong/1/replay_logs: there are no files of checkpoints 1, 2"]
    (logs / "$store$_observation_ckpt.0.gz").unlink()  # the other checkpoint still gives the fields
    assert reader(tmp_path / "s", "dqn-replay").tasks()[0].field("observation.image").shape == (84, 84, 1)


def test_vpt_with_one_unreadable_recording(tmp_path: Path) -> None:
    from tests.dataio.convert.convert_sources import vpt

    expected = vpt(tmp_path / "s")
    (tmp_path / "s/cheeky-0.mp4").write_bytes(b"no video")
    (tmp_path / "s/cheeky-0.jsonl").write_bytes(b"")
    assert recognise(Source(str(tmp_path / "s")), converters()) == "vpt"
    converter = reader(tmp_path / "s", "vpt")
    assert converter.tasks()[0].field("observation.image").shape == (64, 64, 3)
    found = [e.id for p in converter.pieces()[1:] for e in converter.episodes(p) if isinstance(e, Episode)]
    assert found == sorted(expected)[1:]


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


def test_d4rl_without_ends_says_so(tmp_path: Path) -> None:
    import h5py

    rows = np.arange(12, dtype=np.float32)[:, None]
    columns = {"observations": rows, "actions": rows, "rewards": rows[:, 0]}

    def write(**more: Any) -> list[str]:
        with h5py.File(tmp_path / "a.hdf5", "w") as file:
            for key, value in {**columns, **more}.items():
                file[key] = value
        assert sum(e.steps for e in read_all(reader(tmp_path, "d4rl")).values()) == 12
        return reader(tmp_path, "d4rl").notes()

    for more, reason in (
        ({}, "there is neither `terminals` nor `timeouts`"),
        ({"terminals": np.zeros(12, bool), "timeouts": np.zeros(12)}, "`terminals` and `timeouts` mark none"),
    ):
        (note,) = write(**more)
        assert note.startswith(f"a.hdf5: no end of an episode was found ({reason}), so all 12 steps are one episode")
        assert "options: {max_steps: N}" in note
        cut = reader(tmp_path, "d4rl", max_steps=5)
        assert [e.steps for e in read_all(cut).values()] == [5, 5, 2]
        assert cut.notes() == []
    assert "joined with the next one" in write(terminals=np.arange(12) == 5)[0]
    following = np.concatenate([rows[1:], rows[:1]])
    following[3], rows[4] = np.nan, np.nan
    write(next_observations=following)
    assert len(read_all(reader(tmp_path, "d4rl"))) == 1  # NaN equals NaN


@pytest.mark.parametrize(("format", "option"), [("d4rl", "max_steps"), ("vpt", "segment"), ("dqn-replay", "stack")])
@pytest.mark.parametrize("value", [-1, 0, 2.5, "four", True])
def test_options_that_count_are_whole_numbers(made: Any, format: str, option: str, value: Any) -> None:
    converter = reader(made(format)[0], format, **{option: value})
    with pytest.raises(DataError, match=rf"options: {option} .* must be a whole number of at least 1"):
        list(converter.episodes(converter.pieces()[0]))


def test_npz_without_ends_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", observations=np.arange(13)[:, None], actions=np.arange(12), dones=np.zeros(12))
    converter = reader(tmp_path / "a.npz", "npz")
    assert [e.steps for e in read_all(converter).values()] == [12]
    assert converter.notes() == [
        "a.npz: no end of an episode was found, so all 12 steps are one episode; to cut after N steps, set "
        "`options: {max_steps: N}` in the mapping file"
    ]
    converter = reader(tmp_path / "a.npz", "npz", max_steps=5)
    found = read_all(converter)
    assert [(k, e.steps, len(e.fields["observation"])) for k, e in found.items()] == [
        *(("a/000000", 5, 6), ("a/000001", 5, 6), ("a/000002", 2, 3)),
    ]
    assert converter.notes() == []
    np.savez(tmp_path / "b.npz", actions=np.arange(12), dones=np.arange(12) == 11)
    whole = reader(tmp_path / "b.npz", "npz")
    assert (len(read_all(whole)), whole.notes()) == (1, [])
    converter = reader(tmp_path, "npz")  # several files: each is an episode
    assert len(read_all(converter)) == 2
    assert converter.notes() == []


def test_a_minari_dataset_that_is_there_twice_is_refused(made: Any, tmp_path: Path) -> None:
    import shutil

    for name in ("a", "b"):
        shutil.copytree(made("minari-hdf5")[0], tmp_path / "s" / name)
    with pytest.raises(
        DataError, match=r"'toy/data-v0' is there more than once, in a/toy/data-v0/data, b/toy/data-v0/data"
    ):
        reader(tmp_path / "s", "minari").pieces()


def test_each_d4rl_file_is_a_task(tmp_path: Path) -> None:
    import h5py

    for number in range(6):
        with h5py.File(tmp_path / f"{number}.hdf5", "w") as file:
            file["observations"] = file["actions"] = np.zeros((3, number + 1))
            file["rewards"], file["terminals"], file["timeouts"] = np.zeros(3), np.ones(3), np.zeros(3)
    converter = reader(tmp_path, "d4rl")
    assert [t.field("action").shape for t in converter.tasks()] == [(n + 1,) for n in range(6)]
    assert len(read_all(converter)) == 18


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
    (tmp_path / "x.bin").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"none of the known formats.*--from"):
        recognise(Source(str(tmp_path)), converters())
    with pytest.raises(DataError, match="no such file"):
        Source(str(tmp_path / "missing"))
