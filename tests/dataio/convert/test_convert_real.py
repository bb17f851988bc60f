"""Real files, compared with independent readers of the same format."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.test_convert_formats import reader
from tiphys.dataio.convert import convert
from tiphys.dataio.convert.converter import BadEpisode
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import Episode
from tiphys.dataio.index import EpisodeIndex


def test_g1_lerobot_equals_pyav_and_pyarrow(shared_data: Path, tmp_path: Path) -> None:
    """The source lists 100 episodes. Four have rows and one has its video, so one is converted and 99 are reported."""
    import av
    import pyarrow.parquet as pq

    source = shared_data / "g1_lerobot"
    file = tmp_path / "map.yaml"
    file.write_text("fields: {observation.images.*: {encoding: jpeg, quality: 95}}\noptions: {resize: [120, 160]}")
    report = convert(str(source), str(tmp_path / "out"), mapping=str(file), skip_bad=True, processes=1)
    assert (report.episodes, report.steps, len(report.bad)) == (1, 393, 99)
    assert all("is missing" in b.reason for b in report.bad)
    index = EpisodeIndex.open(str(tmp_path / "out"))
    stored = read_episode(index, 0)
    table = pq.read_table(source / "data/chunk-000/episode_000001.parquet")
    for name in ("observation.state", "action"):
        expected = np.array(table.column(name).to_pylist(), np.float32)
        np.testing.assert_array_equal(stored.fields[name], expected)
    assert stored.fields["instruction"] == json.loads((source / "meta/tasks.jsonl").read_text())["task"]
    assert stored.fields["observation.images.cam_high"].shape == (393, 120, 160, 3)

    converter = reader(source, "lerobot")
    items = converter.episodes(converter.pieces()[0])
    episode = next(i for i in items if isinstance(i, Episode))
    frames = episode.fields["observation.images.cam_high"]
    assert frames.shape == (393, 480, 640, 3)
    with av.open(str(source / "videos/chunk-000/observation.images.cam_high/episode_000001.mp4")) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in (0, 1, 200, 392):
                np.testing.assert_array_equal(frames[number], frame.to_ndarray(format="rgb24"))
        assert number == 392


def _protobuf_records(path: Path) -> list[dict[str, list[Any]]]:
    """The records, parsed with Google's protobuf runtime and the schema of tf.Example, which is declared here."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        m = file.message_type.add(name=name)
        for field, number, label, kind, of in fields:
            m.field.add(name=field, number=number, label=label, type=kind, type_name=of or None)
        return m

    one, many, bytes_, float_, int64, nested, string = 1, 3, 12, 2, 3, 11, 9
    message("BytesList", ("value", 1, many, bytes_, ""))
    message("FloatList", ("value", 1, many, float_, ""))
    message("Int64List", ("value", 1, many, int64, ""))
    message(
        "Feature",
        *(
            (n, i, one, nested, f".t.{t}")
            for i, (n, t) in enumerate((("b", "BytesList"), ("f", "FloatList"), ("i", "Int64List")), 1)
        ),
    )
    features = message("Features", ("feature", 1, many, nested, ".t.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.field.add(name="key", number=1, label=one, type=string)
    entry.field.add(name="value", number=2, label=one, type=nested, type_name=".t.Feature")
    entry.options.map_entry = True
    message("Example", ("features", 1, one, nested, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))
    out, data, at = [], path.read_bytes(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        parsed = kind.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        out.append(
            {k: list(v.b.value) or list(v.f.value) or list(v.i.value) for k, v in parsed.features.feature.items()}
        )
    return out


def test_bridge_rlds_equals_protobuf_and_pillow(shared_data: Path, tmp_path: Path) -> None:
    from PIL import Image

    pytest.importorskip("google.protobuf")
    source = shared_data / "bridge_rlds"
    theirs = _protobuf_records(next(source.rglob("*.tfrecord-*")))
    converter = reader(source, "rlds")
    ours = [i for p in converter.pieces() for i in converter.episodes(p)]
    assert len(ours) == len(theirs) == 25
    assert any("val" in n for n in converter.notes())
    for episode, record in zip(ours, theirs, strict=True):
        assert not isinstance(episode, BadEpisode)
        steps = len(record["steps/is_last"])
        assert episode.steps == steps
        for name, key, width in (
            ("action", "action", 7),
            ("observation.state", "observation/state", 7),
            ("language_embedding", "language_embedding", 512),
        ):
            np.testing.assert_array_equal(
                episode.fields[name], np.array(record[f"steps/{key}"], np.float32).reshape(steps, width)
            )
        np.testing.assert_array_equal(episode.fields["reward"], np.array(record["steps/reward"], np.float32))
        assert episode.fields["language_instruction"].tolist() == [
            t.decode() for t in record["steps/language_instruction"]
        ]
        for step in (0, steps - 1):
            for camera in range(4):
                picture = np.array(Image.open(io.BytesIO(record[f"steps/observation/image_{camera}"][step])))
                np.testing.assert_array_equal(episode.fields[f"observation.image_{camera}"][step], picture)
    subset = {"fields": {f"observation.image_{i}": "drop" for i in (1, 2, 3)}}
    report = convert(str(source), str(tmp_path / "out"), mapping=subset, processes=1)
    assert (report.episodes, report.steps) == (25, sum(len(r["steps/is_last"]) for r in theirs))
    index = EpisodeIndex.open(str(tmp_path / "out"))
    for number in (0, 24):
        stored = read_episode(index, number)
        np.testing.assert_array_equal(stored.fields["observation.image_0"], ours[number].fields["observation.image_0"])  # type: ignore[union-attr]
        assert stored.fields["language_instruction"] == theirs[number]["steps/language_instruction"][0].decode()
