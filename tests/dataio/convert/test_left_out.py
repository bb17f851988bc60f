"""Texts of episodes become fields in every format that has them; what is not converted is listed in the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.convert_sources import LENGTHS, d4rl, npz, robomimic, zarr_buffer
from tests.dataio.convert.test_convert_pieces import episodes_of
from tiphys.dataio.convert import ConversionReport, convert
from tiphys.dataio.episode import Episode


def converted(folder: Path, tmp_path: Path, **settings: Any) -> tuple[ConversionReport, list[Episode]]:
    report = convert(str(folder), str(tmp_path / "out"), processes=1, **settings)
    return report, list(episodes_of(tmp_path / "out").values())


def test_the_instruction_of_a_libero_file(tmp_path: Path) -> None:
    import h5py

    robomimic(tmp_path / "s")
    with h5py.File(tmp_path / "s/low_dim.hdf5", "a") as file:
        data = file["data"]
        data.attrs["problem_info"] = json.dumps({"problem_name": "p", "language_instruction": "open the drawer"})
        data.attrs["bddl_file_name"] = "a.bddl"
        data["demo_2"].attrs["language_instruction"] = "close the drawer"
        data["demo_2"].attrs["model_file"] = "<mujoco/>" * 1000
        data["demo_0"].attrs["seed"] = 7
        data["demo_0/goal"] = np.zeros(17)
        file["extra"] = 1
    report, episodes = converted(tmp_path / "s", tmp_path)
    assert [e.fields["language_instruction"] for e in episodes] == [
        "open the drawer",
        "close the drawer",
        "open the drawer",
    ]
    assert episodes[0].info == {"seed": 7, "masks": ["train"]}
    left_out = [n for n in report.notes if n.startswith("left out: ")]
    for name in ("extra", "data, attribute bddl_file_name", "attribute model_file", "goal"):
        assert any(name in note for note in left_out), name
        assert any(name in line for line in str(report).splitlines()), name
    assert json.loads((tmp_path / "out/conversion.json").read_text())["notes"] == list(report.notes)


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        ("env_args", json.dumps({"env_name": "Lift", "env_kwargs": {"lang": "lift it"}})),
        ("env_args", json.dumps({"env_name": "Lift", "language_instruction": list("lift it")})),
        ("ep_meta", json.dumps({"lang": "lift it"})),
        ("instruction", "lift it"),
    ],
)
def test_other_places_of_an_instruction_in_hdf5(attribute: str, text: str, tmp_path: Path) -> None:
    import h5py

    robomimic(tmp_path / "s")
    with h5py.File(tmp_path / "s/low_dim.hdf5", "a") as file:
        for holder in [file["data"]] if attribute == "env_args" else file["data"].values():
            holder.attrs[attribute] = text
    _, episodes = converted(tmp_path / "s", tmp_path)
    field = "language_instruction" if "language_instruction" in text else "instruction"
    assert {e.fields[field] for e in episodes} == {"lift it"}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning", "ignore::zarr.errors.ZarrUserWarning")
def test_texts_of_a_zarr_buffer(version: int, tmp_path: Path) -> None:
    import zarr
    from numpy.dtypes import StringDType

    source = tmp_path / "s.zarr"
    zarr_buffer(source, version)
    root = zarr.open_group(str(source))
    words = [f"do {i}" for i in range(len(LENGTHS))]
    root.create_array("meta/caption", shape=(3,), dtype="str")[:] = np.array(words, StringDType())
    root.create_array("meta/goal_name", data=np.array(words, "<U8"))
    root.create_array("meta/seed", data=np.arange(3))
    root.create_array("meta/odd", data=np.zeros(5))
    root.create_array("data/instruction", data=np.array(["a", "b"] * 6, "<U4"))
    root.create_array("camera", data=np.zeros(5))
    root.attrs["mission"], root.attrs["fps"] = "tidy up", 10
    report, episodes = converted(source, tmp_path)
    assert [e.fields["caption"] for e in episodes] == words
    assert [e.info for e in episodes] == [{"goal_name": w, "seed": i} for i, w in enumerate(words)]
    assert {e.fields["mission"] for e in episodes} == {"tidy up"}
    assert episodes[0].fields["instruction"].tolist() == ["a", "b", "a", "b", "a"]
    assert [n.split(" (")[0] for n in report.notes] == [
        "left out: meta/odd",
        "left out: root, attribute fps",
        "left out: camera",
    ]


def test_values_by_episode_in_a_flat_npz(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    np.savez(
        tmp_path / "s/a.npz",
        obs=np.arange(9),
        actions=np.arange(9),
        episode_ends=[3, 6, 9],
        instruction=np.array(["a", "b", "c"]),
        seed=np.array([7, 8, 9]),  # as many as an episode has steps
        matrix=np.eye(4),
    )
    report, episodes = converted(tmp_path / "s", tmp_path)
    assert [e.fields["instruction"] for e in episodes] == ["a", "b", "c"]
    assert [e.info for e in episodes] == [{"seed": 7}, {"seed": 8}, {"seed": 9}]
    assert all("seed" not in e.fields for e in episodes)
    assert [n.split(" (")[0] for n in report.notes] == ["left out: matrix"]


def test_groups_of_d4rl_and_members_of_npz(tmp_path: Path) -> None:
    import zipfile

    d4rl(tmp_path / "d")
    assert any("metadata.algorithm" in n for n in converted(tmp_path / "d", tmp_path)[0].notes)
    npz(tmp_path / "n")
    with zipfile.ZipFile(tmp_path / "n/000.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    report = convert(str(tmp_path / "n"), str(tmp_path / "out-n"), processes=1)
    assert [n.split(" (")[0] for n in report.notes] == ["left out: member readme.txt"]


def test_other_values_beside_texts_and_images(made: Any, tmp_path: Path) -> None:
    for name, left_out in (("jsonl", ["left out: meta"]), ("text-parquet", ["left out: score"]), ("webdataset", [])):
        report = convert(str(made(name)[0]), str(tmp_path / name), processes=1)
        assert [n.split(" (")[0] for n in report.notes] == left_out


def test_a_field_that_only_later_episodes_have_is_listed(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for number in range(8):
        late = {"reward": np.ones(3)} if number == 7 else {}
        np.savez(tmp_path / f"s/{number}.npz", obs=np.zeros(3), actions=np.zeros(3), **late)
    report, _ = converted(tmp_path / "s", tmp_path)
    assert [n.split(" (")[0] for n in report.notes] == ["left out: field reward"]


# ---- archives


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.tar.zst"])
def test_archives_are_refused_by_name_or_listed(made: Any, name: str, tmp_path: Path) -> None:
    import shutil

    from tiphys.dataio.episode import DataError

    folder = tmp_path / "s"
    folder.mkdir()
    base = name.partition(".")[2]
    shutil.make_archive(str(folder / "a"), "zip" if base == "zip" else "gztar", made("npz")[0])
    if base == "tar.zst":
        (folder / "a.tar.gz").rename(folder / name)
    for source in (folder, folder / name):
        with pytest.raises(DataError, match=rf"{name}.*unpack it"):
            convert(str(source), str(tmp_path / "out"), processes=1)
    with pytest.raises(DataError, match=r"archive, which the format 'lerobot' does not read; unpack it"):
        convert(str(folder / name), str(tmp_path / "out"), format="lerobot", processes=1)
    shutil.copy(next(Path(made("npz")[0]).iterdir()), folder / "0.npz")
    report, _ = converted(folder, tmp_path)
    left_out = [n.split(" (")[0] for n in report.notes if n.startswith("left out")]
    assert left_out == [f"left out: {name}"]


def test_files_that_no_converter_reads_get_advice(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tiphys.dataio.episode import DataError

    (tmp_path / "s").mkdir()
    (tmp_path / "p").mkdir()
    (tmp_path / "s/a.pkl").write_bytes(b"x")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "p/000.parquet")  # as Ray writes
    for folder, words in (("s", "pickles"), ("p", "only as LeRobot or Minari")):
        with pytest.raises(DataError, match=words):
            convert(str(tmp_path / folder), str(tmp_path / "out"), processes=1)
