"""Features of TFDS in the forms that its writers know, and folders that hold a dataset several times."""

from __future__ import annotations

import gzip
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.convert_sources import (
    TFDS_TEXT,
    example,
    picture,
    rlds,
    tfds_dict,
    tfds_sequence,
    tfds_tensor,
    tfrecord,
    write_tfds,
)
from tests.dataio.convert.test_convert_formats import read_all, reader
from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError
from tiphys.dataio.index import EpisodeIndex

STEPS = 3


def written(folder: Path, step: dict[str, Any], values: dict[str, Any], episode: Any = None, count: int = 2) -> Path:
    """A dataset of `count` equal episodes with a scalar action and the given features."""
    tree = tfds_dict(
        steps=tfds_sequence(tfds_dict(action=tfds_tensor("float32"), **step), "Dataset"), **(episode or {})
    )
    write_tfds(folder, tree, [example({"steps/action": np.arange(STEPS, dtype=np.float32), **values})] * count)
    return folder


def test_texts_and_numbers_of_an_episode_are_fields(tmp_path: Path) -> None:
    episode = {
        "language_instruction": TFDS_TEXT,
        "reward": tfds_tensor("float32"),
        "episode_metadata": tfds_dict(
            instruction=TFDS_TEXT,
            file_path=tfds_tensor("string"),
            seed=tfds_tensor("int64"),
            box=tfds_tensor("int64", 2),
        ),
    }
    values = {
        "steps/language_instruction": [b"by step"] * STEPS,
        "language_instruction": [b"by episode"],
        "reward": np.array([2.5], np.float32),
        "episode_metadata/instruction": ["pick up the ü".encode()],
        "episode_metadata/file_path": [b"/a"],
        "episode_metadata/seed": np.array([7]),
        "episode_metadata/box": np.array([1, 2]),
    }
    source = written(tmp_path / "s", {"language_instruction": TFDS_TEXT}, values, episode)
    rules = {"fields": {"episode_metadata.instruction": {"name": "mission"}, "episode_metadata.file_path": "drop"}}
    convert(str(source), str(tmp_path / "out"), mapping=rules, processes=1)
    index = EpisodeIndex.open(str(tmp_path / "out"))
    found = read_episode(index, 0).fields
    assert {f.name: (f.role, f.per) for f in index.tasks[0].fields} == {
        "action": ("action", "step"),
        "language_instruction": ("text", "episode"),
        "mission": ("text", "episode"),
        "episode.language_instruction": ("text", "episode"),
        "episode.reward": ("info", "episode"),
        "episode_metadata.seed": ("info", "episode"),
        "episode_metadata.box": ("info", "episode"),
    }
    assert found["mission"] == "pick up the ü"
    assert (found["language_instruction"], found["episode.language_instruction"]) == ("by step", "by episode")
    assert (float(found["episode.reward"]), int(found["episode_metadata.seed"])) == (2.5, 7)
    assert found["episode_metadata.box"].tolist() == [1, 2]


def test_what_the_mapping_drops_is_not_decoded(tmp_path: Path) -> None:
    image = {"pythonClassName": "x.Image", "image": {"shape": {"dimensions": ["16", "16", "3"]}, "dtype": "uint8"}}
    source = written(tmp_path / "s", {"image": image}, {"steps/image": [b"no picture"] * STEPS})
    with pytest.raises(DataError, match="is not a JPEG"):
        convert(str(source), str(tmp_path / "bad"), processes=1)
    report = convert(str(source), str(tmp_path / "out"), mapping={"fields": {"image": "drop"}}, processes=1)
    assert (report.episodes, report.bad) == (2, ())


def test_truncated_does_not_depend_on_whether_terminated_is_dropped(tmp_path: Path) -> None:
    expected = rlds(tmp_path / "s")
    convert(str(tmp_path / "s"), str(tmp_path / "out"), mapping={"fields": {"terminated": "drop"}}, processes=1)
    index = EpisodeIndex.open(str(tmp_path / "out"))
    for e in range(index.episodes):
        found = read_episode(index, e).fields
        assert "terminated" not in found
        np.testing.assert_array_equal(found["truncated"], expected[index.id(e)][1]["truncated"])


def test_tensors_stored_as_bytes(tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    fixed, flags = r.normal(size=(STEPS, 2, 2)), r.integers(0, 2, (STEPS, 5)).astype(bool)
    length, several = r.integers(0, 9, (STEPS, 4)).astype(np.uint16), r.normal(size=(STEPS, 2, 3)).astype(np.float32)
    step = {
        "fixed": tfds_tensor("float64", 2, 2, encoding="zlib"),
        "flags": tfds_tensor("bool", 5, encoding="bytes"),
        "length": tfds_tensor("uint16", -1, encoding="zlib"),
        "several": tfds_tensor("float32", -1, -1, encoding="bytes"),
    }
    values = {
        "steps/fixed": [zlib.compress(v.tobytes()) for v in fixed],
        "steps/flags": [v.tobytes() for v in flags],
        "steps/length": [zlib.compress(v.tobytes()) for v in length],
        "steps/several/value": [v.tobytes() for v in several],
        "steps/several/shape": np.array([[2, 3]] * STEPS),
    }
    found = read_all(reader(written(tmp_path / "s", step, values), "rlds"))
    for name, wanted in (("fixed", fixed), ("flags", flags), ("length", length), ("several", several)):
        np.testing.assert_array_equal(next(iter(found.values())).fields[name], wanted)


def test_what_no_field_can_hold_is_listed(tmp_path: Path) -> None:
    video = {"pythonClassName": "x.Video", "video": {"shape": {"dimensions": ["-1", "16", "16", "3"]}}}
    step = {
        "ragged": tfds_sequence(tfds_tensor("int64")),
        "even": tfds_sequence(tfds_tensor("int64")),
        "words": tfds_sequence(TFDS_TEXT),
        "half": tfds_tensor("bfloat16"),
    }
    values = {
        "steps/ragged/ragged_flat_values": np.arange(6),
        "steps/ragged/ragged_row_lengths_0": np.array([1, 2, 3]),
        "steps/even/ragged_flat_values": np.arange(6),
        "steps/even/ragged_row_lengths_0": np.array([2, 2, 2]),
        "steps/words": [b"a"] * STEPS,
        "video": [picture(np.zeros((16, 16, 3), np.uint8))],
    }
    converter = reader(written(tmp_path / "s", step, values, {"video": video}), "rlds")
    found = next(iter(read_all(converter).values()))
    assert found.fields["even"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert sorted(found.fields) == ["action", "even"]
    notes = "\n".join(converter.notes())
    for name in (
        r"steps/ragged (its length differs from step to step",
        "steps/words (a sequence of texts in one step)",
        "steps/half (its dtype bfloat16 cannot be read)",
        "video (a Video)",
    ):
        assert f"left out: {name}" in notes


def test_a_length_that_differs_only_in_a_later_episode(tmp_path: Path) -> None:
    tree = tfds_dict(
        steps=tfds_sequence(tfds_dict(x=tfds_sequence(tfds_tensor("int64")), y=tfds_tensor("int64")), "Dataset")
    )

    def record(*lengths: int) -> bytes:
        values = {"ragged_flat_values": np.zeros(sum(lengths), np.int64), "ragged_row_lengths_0": np.array(lengths)}
        return example({"steps/y": np.arange(len(lengths)), **{f"steps/x/{k}": v for k, v in values.items()}})

    for name, second in (("steps", (1, 2)), ("episodes", (3, 3))):
        write_tfds(tmp_path / name, tree, [record(2, 2), record(*second)])
        assert [sorted(e.fields) for e in read_all(reader(tmp_path / name, "rlds")).values()] == [["y"], ["y"]]


def test_an_absent_value_of_an_optional_feature_is_not_data(tmp_path: Path) -> None:
    """TFDS stores the smallest number of the dtype instead."""
    absent = np.array([1, np.finfo(np.float32).min, 2], np.float32)
    source = written(tmp_path / "s", {"force": tfds_tensor("float32", optional=True)}, {"steps/force": absent})
    with pytest.raises(DataError, match=r"steps/force: .* row 1 has no value.*force: drop"):
        convert(str(source), str(tmp_path / "bad"), processes=1)
    assert convert(str(source), str(tmp_path / "out"), mapping={"fields": {"force": "drop"}}, processes=1).episodes == 2


def test_gzipped_shards_of_several_members(tmp_path: Path) -> None:
    expected = rlds(tmp_path / "s")
    for shard in (tmp_path / "s").glob("*.tfrecord-*"):
        data = shard.read_bytes()
        shard.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]) + b"\0" * 512)
    assert sorted(read_all(reader(tmp_path / "s", "rlds"))) == sorted(expected)


def test_a_record_whose_length_begins_like_gzip(tmp_path: Path) -> None:
    text = b"x" * (0x088B1F - len(example({"steps/action": np.zeros(1, np.float32), "note": [b"x" * (1 << 18)]})))
    record = example({"steps/action": np.zeros(1, np.float32), "note": [text + b"x" * (1 << 18)]})
    assert tfrecord([record]).startswith(b"\x1f\x8b\x08")
    tree = tfds_dict(steps=tfds_sequence(tfds_dict(action=tfds_tensor("float32")), "Dataset"), note=TFDS_TEXT)
    write_tfds(tmp_path / "s", tree, [record])
    assert len(read_all(reader(tmp_path / "s", "rlds"))) == 1


def copies(root: Path, **places: dict[str, str]) -> Path:
    rlds(root.parent / "one")
    for place, info in places.items():
        folder = root / place.replace("__", "/").replace("_", ".")
        shutil.copytree(root.parent / "one", folder)
        document = folder / "dataset_info.json"
        document.write_text(
            document.read_text().replace("{", f'{{"{next(iter(info))}": "{next(iter(info.values()))}", ', 1)
        )
    return root


@pytest.mark.parametrize(
    ("key", "places"),
    [
        ("version", {"toy__0_1_0": {"version": "0.1.0"}, "toy__1_0_0": {"version": "1.0.0"}}),
        ("config", {"toy__a__1_0_0": {"configName": "a"}, "toy__b__1_0_0": {"configName": "b"}}),
    ],
)
def test_of_several_versions_or_configs_one_is_chosen(tmp_path: Path, key: str, places: Any) -> None:
    source = copies(tmp_path / "tree", **places)
    first, last = (next(iter(i.values())) for i in places.values())
    with pytest.raises(
        DataError, match=rf"'toy' has the {key}s {first}, {last}; choose one .*options: {{{key}: {last}}}"
    ):
        convert(str(source), str(tmp_path / "bad"), processes=1)
    for chosen in (last, {"toy": last}):
        assert reader(source, "rlds", **{key: chosen})._folders == [
            next(p for p in reversed(places)).replace("__", "/").replace("_", ".")
        ]
    with pytest.raises(DataError, match=f"dataset 'toy' has {first}, {last}"):
        reader(source, "rlds", **{key: "9.9.9"}).pieces()


def test_a_copy_of_a_dataset_is_refused(tmp_path: Path) -> None:
    source = copies(tmp_path / "tree", a={"version": "1.0.0"}, b={"version": "1.0.0"})
    with pytest.raises(DataError, match="more than once, in the folders a, b"):
        reader(source, "rlds").pieces()


def test_other_containers_than_tfrecord_are_named(tmp_path: Path) -> None:
    source = written(tmp_path / "s", {}, {})
    (source / "toy-train.tfrecord-00000-of-00001").rename(source / "toy-train.array_record-00000-of-00001")
    with pytest.raises(DataError, match=r"the data are array_record files.*file_format=tfrecord"):
        convert(str(source), str(tmp_path / "out"), processes=1)
