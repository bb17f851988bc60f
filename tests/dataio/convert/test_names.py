"""Two names in a source never become one field silently; a mapping file addresses names in the source and of fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.convert_sources import (
    d4rl,
    example,
    lerobot_v2,
    minari,
    rlds,
    robomimic,
    tfrecord,
    zarr_buffer,
)
from tests.dataio.convert.test_convert_pieces import episodes_of
from tiphys.dataio.convert import convert
from tiphys.dataio.convert.mapping import Mapping
from tiphys.dataio.convert.names import AmbiguousNames, FieldNames
from tiphys.dataio.episode import DataError
from tiphys.dataio.index import EpisodeIndex


def write_npz(folder: Path, **arrays: Any) -> str:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "a.npz", actions=np.zeros((3, 2)), **arrays)
    return str(folder)


def make_npz(folder: Path) -> tuple[str, str, str]:
    write_npz(folder, obs=np.ones((3, 2)), state=np.zeros((3, 4)))
    return "obs", "state", "observation"


def make_zarr(folder: Path) -> tuple[str, str, str]:
    import zarr

    zarr_buffer(folder)
    for name in ("terminals", "dones"):
        zarr.open_group(str(folder)).create_array(f"data/{name}", data=np.zeros(12, bool))
    return "dones", "terminals", "terminated"


def make_lerobot(folder: Path) -> tuple[str, str, str]:
    lerobot_v2(folder)
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["done"] = info["features"]["next.done"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    return "next.done", "done", "terminated"


def make_rlds(folder: Path) -> tuple[str, str, str]:
    rlds(folder)
    tree = json.loads((folder / "features.json").read_text())
    steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    steps["state"], steps["observation"] = steps["reward"], steps["reward"]
    (folder / "features.json").write_text(json.dumps(tree))
    record = tfrecord([example({"steps/action": np.zeros(2)})])
    (folder / "toy-train.tfrecord-00000-of-00002").write_bytes(record)
    return "steps/observation", "steps/state", "observation"


def make_robomimic(folder: Path) -> tuple[str, str, str]:
    import h5py

    robomimic(folder)
    with h5py.File(folder / "low_dim.hdf5", "a") as file:
        for demo in file["data"].values():
            demo["terminals"] = demo["dones"][:]
    return "dones", "terminals", "terminated"


def make_d4rl(folder: Path) -> tuple[str, str, str]:
    import h5py

    d4rl(folder)
    with h5py.File(folder / "hopper.hdf5", "a") as file:
        file["qpos"] = file["infos/qpos"][:]
    return "infos.qpos", "qpos", "info.qpos"


def make_minari(folder: Path) -> tuple[str, str, str]:
    minari(folder)
    path = next(folder.rglob("data/metadata.json"))
    metadata = json.loads(path.read_text())
    space = json.loads(metadata["observation_space"])
    pair = next(s for s in space["subspaces"].values() if s["type"] == "Tuple")
    space["subspaces"]["pair.0"] = pair["subspaces"][0]
    path.write_text(json.dumps(metadata | {"observation_space": json.dumps(space)}))
    return "observations/pair/0", "observations/pair.0", "observation.pair.0"


MAKERS = [make_npz, make_zarr, make_lerobot, make_rlds, make_robomimic, make_d4rl, make_minari]


@pytest.mark.parametrize("make", MAKERS)
def test_two_names_that_become_one_field(make: Callable[[Path], tuple[str, str, str]], tmp_path: Path) -> None:
    first, second, field = make(tmp_path / "s")
    with pytest.raises(AmbiguousNames) as error:
        convert(str(tmp_path / "s"), str(tmp_path / "out"), processes=1, skip_bad=True)
    for word in (repr(first), repr(second), repr(field), f"{second}: drop", "name: "):
        assert word in str(error.value)
    assert not (tmp_path / "out/dataset.json").exists()


def test_the_mapping_of_the_message_resolves_a_collision(tmp_path: Path) -> None:
    source = write_npz(
        tmp_path / "s", obs=np.ones((3, 2)), state=np.zeros((3, 4)), dones=np.zeros(3), terminals=np.arange(3) == 2
    )
    fields = {"state": {"name": "observation.state", "low": 0}, "dones": {"name": "info.dones"}}
    convert(source, str(tmp_path / "out"), mapping={"fields": fields}, processes=1)
    (episode,) = episodes_of(tmp_path / "out").values()
    assert episode.fields["observation"].tolist() == np.ones((3, 2)).tolist()
    assert episode.fields["observation.state"].tolist() == np.zeros((3, 4)).tolist()
    assert episode.fields["terminated"].tolist() == [False, False, True]
    (task,) = EpisodeIndex.open(str(tmp_path / "out")).tasks
    assert {f.name: f.role for f in task.fields} == {
        "action": "action",
        "observation": "observation",
        "observation.state": "observation",
        "terminated": "terminated",
        "info.dones": "info",
    }
    assert task.field("observation.state").low == (0.0,)


def test_a_later_file_may_name_the_same_field_differently(tmp_path: Path) -> None:
    write_npz(tmp_path / "s", obs=np.ones((3, 2)))
    np.savez(tmp_path / "s/b.npz", actions=np.zeros((3, 2)), state=np.zeros((3, 2)))
    assert convert(str(tmp_path / "s"), str(tmp_path / "out"), processes=1).episodes == 2


def test_names_equal_in_their_first_64_letters(tmp_path: Path) -> None:
    names = ["info." + "x" * 60 + end for end in "ab"]
    source = write_npz(tmp_path / "s", **{n: np.full(3, i) for i, n in enumerate(names)})
    with pytest.raises(AmbiguousNames, match=f"{names[0]}' and '{names[1]}"):
        convert(source, str(tmp_path / "out"), processes=1)
    convert(source, str(tmp_path / "out"), mapping={"fields": {names[1]: {"name": "info.b"}}}, processes=1)
    (episode,) = episodes_of(tmp_path / "out").values()
    assert episode.fields["info.b"].tolist() == [1, 1, 1]


def test_a_name_in_the_source_is_dropped(made: Any, tmp_path: Path) -> None:
    source = made("lerobot-v2")[0]
    fields = {"next.reward": "drop", "observation.state": {"name": "proprioception"}}
    convert(str(source), str(tmp_path / "out"), mapping={"fields": fields}, processes=1)
    (task,) = EpisodeIndex.open(str(tmp_path / "out")).tasks
    assert "reward" not in {f.name for f in task.fields}
    assert task.field("proprioception").role == "observation"  # the new name states no role


def test_flags_of_rlds_are_addressed_by_their_names(made: Any, tmp_path: Path) -> None:
    source = made("rlds")[0]
    fields = {"steps/is_terminal": "drop", "steps/is_last": {"name": "info.last"}}
    convert(str(source), str(tmp_path / "out"), mapping={"fields": fields}, processes=1, skip_bad=True)
    (task,) = EpisodeIndex.open(str(tmp_path / "out")).tasks
    names = {f.name: f.role for f in task.fields}
    assert names["info.last"] == "info"
    assert not {"terminated", "truncated"} & set(names)


def resolve(fields: dict[str, Any], usual: dict[str, str]) -> dict[str, Any]:
    mapping = Mapping.from_dict({"fields": fields})
    names = FieldNames(mapping.fields)
    names.fields(usual, "x")
    return dict(mapping.resolve(names.seen).fields)


def test_a_name_in_the_source_wins_over_the_name_of_a_field() -> None:
    usual = {"obs": "observation", "observation": "observation", "a": "action"}
    fields = {"observation": {"name": "observation.b", "low": 1}, "action": {"high": 2}, "obs*": {"dtype": "float32"}}
    assert resolve(fields, usual) == {
        "observation.b": {"low": 1},
        "action": {"high": 2},
        "obs*": {"dtype": "float32"},
    }


@pytest.mark.parametrize(
    ("fields", "usual", "message"),
    [
        ({"a": {"low": 1}, "action": {"low": 2}}, {"a": "action"}, "fields.a and fields.action address the same field"),
        ({"x": "drop"}, {"x": "info.x", "y": "x"}, "fields.x is ambiguous.*write 'info.x'.*'y'"),
    ],
)
def test_ambiguous_keys_of_a_mapping(fields: dict[str, Any], usual: dict[str, str], message: str) -> None:
    with pytest.raises(AmbiguousNames, match=message):
        resolve(fields, usual)


@pytest.mark.parametrize(
    ("mapping", "hint"),
    [
        ({"fields": {"rewrad": "drop"}}, "did you mean 'reward'"),
        ({"fields": {"observation.vektor": "drop"}}, "did you mean 'observation.vector'"),
        ({"feilds": {}}, "did you mean 'fields'"),
        ({"fields": {"action": {"rol": "info"}}}, "did you mean 'role'"),
        ({"task": {"npx": "a"}}, "did you mean 'npz'"),
    ],
)
def test_unknown_names_in_a_mapping_get_a_hint(made: Any, mapping: dict[str, Any], hint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=hint):
        convert(str(made("npz")[0]), str(tmp_path / "out"), mapping=mapping, processes=1)


# ---- episodes


def test_two_episodes_with_one_id(tmp_path: Path) -> None:
    """Of one piece and of two pieces; with --skip-bad too, because it is unknown which of the two is meant."""
    source = tmp_path / "hopper"
    d4rl(source)
    (source / "hopper.h5").write_bytes((source / "hopper.hdf5").read_bytes())  # the task is named after the file
    for skip_bad in (False, True):
        with pytest.raises(AmbiguousNames, match=r"'hopper/00000000'.*hopper\.h5 .*hopper\.hdf5 "):
            convert(str(source), str(tmp_path / "out"), processes=1, skip_bad=skip_bad)
    assert not (tmp_path / "out/dataset.json").exists()


def test_two_episodes_of_one_piece_with_one_id(tmp_path: Path) -> None:
    from tiphys.dataio.export import export

    write_npz(tmp_path / "s", obs=np.ones((3, 2)))
    convert(str(tmp_path / "s"), str(tmp_path / "made"), processes=1)
    export(str(tmp_path / "made"), str(tmp_path / "exported"), format="npz")
    (file,) = (tmp_path / "exported").rglob("*.npz")
    file.with_name("copy.npz").write_bytes(file.read_bytes())
    with pytest.raises(AmbiguousNames, match=r"two episodes have the id.*readable episode 0.*readable episode 1"):
        convert(str(tmp_path / "exported"), str(tmp_path / "out"), processes=1)
