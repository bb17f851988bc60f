"""LeRobot sources that differ from the plain ones: pictures of other kinds, files in another order, parts that are missing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.dataio.convert.convert_sources import LENGTHS, lerobot_v2, lerobot_v3, picture
from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import inspect, read_episode
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.index import EpisodeIndex

TOP, DEPTH = "observation.images.top", "observation.depth"


def edit_info(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path, row_group_size=2)


def add_feature(folder: Path, name: str, feature: dict[str, Any], columns: list[Any]) -> None:
    """Add a feature to a v2 source, with one Arrow column for each episode."""
    edit_info(folder, lambda info: info["features"].update({name: feature}))
    for number, column in enumerate(columns):
        path = folder / f"data/chunk-000/episode_{number:06d}.parquet"
        rewrite(path, lambda table, c=column: table.append_column(name, c))


def add_images(folder: Path, images: list[list[bytes]], shape: list[int], **info: Any) -> None:
    kind = {"dtype": "image", "shape": shape, "names": ["height", "width", "channel"], "info": info}
    add_feature(folder, DEPTH, kind, [pa.array([{"bytes": b, "path": None} for b in rows]) for rows in images])


def converted(folder: Path, out: Path, **options: Any) -> tuple[EpisodeIndex, dict[str, Episode], Any]:
    report = convert(str(folder), str(out), processes=1, **options)
    index = EpisodeIndex.open(str(out))
    episodes = [read_episode(index, i) for i in range(index.episodes)]
    return index, {e.id: e for e in episodes}, report


def millimetres() -> list[np.ndarray]:
    """Depths of each episode in millimetres, all above 255."""
    r = np.random.default_rng(0)
    return [r.integers(300, 5300, (n, 24, 32, 1)).astype(np.uint16) for n in LENGTHS]


def tiff(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image[..., 0]).save(out, "TIFF")
    return out.getvalue()


def encode_grey(path: Path, codes: np.ndarray) -> None:
    """A lossless video with 12 bits per pixel, of codes [T, H, W]."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=10, options={"x265-params": "lossless=1:log-level=none"})
        stream.width, stream.height, stream.pix_fmt = codes.shape[2], codes.shape[1], "gray12le"
        for code in codes:
            frame = av.VideoFrame(codes.shape[2], codes.shape[1], "gray12le")
            padded = np.zeros((codes.shape[1], frame.planes[0].line_size // 2), np.uint16)
            padded[:, : codes.shape[2]] = code
            frame.planes[0].update(padded.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def depth_video(folder: Path, **info: Any) -> list[np.ndarray]:
    """Replace the camera of a v2 source by a depth video. Returns its codes."""
    r = np.random.default_rng(0)
    codes = [r.integers(0, 4096, (n, 64, 70)).astype(np.uint16) for n in LENGTHS]
    for number, code in enumerate(codes):
        encode_grey(folder / f"videos/chunk-000/{TOP}/episode_{number:06d}.mp4", code)
    shape = {"shape": [64, 70, 1], "info": {"is_depth_map": True, **info}}
    edit_info(folder, lambda i: i["features"][TOP].update(shape))
    return codes


# ---- pictures that are not 8-bit RGB


def test_depth_images_of_16_bits_keep_their_values(tmp_path: Path) -> None:
    """The metadata say nothing of 16 bits; the pictures do."""
    depth = millimetres()
    lerobot_v2(tmp_path / "s")
    add_images(
        tmp_path / "s", [[picture(d) for d in rows] for rows in depth], [24, 32, 1], is_depth_map=True, depth_unit="mm"
    )
    mapping = {"fields": {DEPTH: {"low": 0, "high": 6000}}}
    index, episodes, _ = converted(tmp_path / "s", tmp_path / "out", mapping=mapping)
    field = index.tasks[0].field(DEPTH)
    assert (field.dtype, field.shape, field.modality, field.unit) == ("uint16", (24, 32, 1), "image", "mm")
    assert (field.low, field.high) == ((0.0,), (6000.0,))
    for number, rows in enumerate(depth):
        np.testing.assert_array_equal(episodes[f"s/{number:06d}"].fields[DEPTH], rows)
    shown = inspect(str(tmp_path / "out"))["fields"][DEPTH]
    assert (shown["low"], shown["high"], shown["unit"]) == ([0.0], [6000.0], "mm")


def test_16_bit_images_without_bounds_are_noted(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "s")
    add_images(tmp_path / "s", [[picture(d) for d in rows] for rows in millimetres()], [24, 32, 1])
    _, _, report = converted(tmp_path / "s", tmp_path / "out")
    assert any(DEPTH in n and "65535 for white" in n and "`low` and `high`" in n for n in report.notes)


def test_a_picture_wider_than_the_first_is_refused(tmp_path: Path) -> None:
    depth = millimetres()
    images = [[picture(d) for d in rows] for rows in depth]
    images[0] = [picture((d // 32).astype(np.uint8)) for d in depth[0]]
    lerobot_v2(tmp_path / "s")
    add_images(tmp_path / "s", images, [24, 32, 1])
    with pytest.raises(DataError, match=rf"episode s/000001: field '{DEPTH}': the uint16 value \d+ at .*uint8"):
        converted(tmp_path / "s", tmp_path / "out")


def test_float_images_need_bounds(tmp_path: Path) -> None:
    depth = [rows.astype(np.float32) / 1000 for rows in millimetres()]
    lerobot_v2(tmp_path / "s")
    add_images(
        tmp_path / "s", [[tiff(d) for d in rows] for rows in depth], [24, 32, 1], is_depth_map=True, depth_unit="m"
    )
    with pytest.raises(DataError, match=rf"black and white.*{DEPTH} \(float32.*`low` and `high`.*mapping file"):
        converted(tmp_path / "s", tmp_path / "out")
    mapping = {"fields": {DEPTH: {"low": 0, "high": 5.3}}}
    index, episodes, _ = converted(tmp_path / "s", tmp_path / "out", mapping=mapping)
    assert index.tasks[0].field(DEPTH).unit == "m"
    np.testing.assert_array_equal(episodes["s/000001"].fields[DEPTH], depth[1])


@pytest.mark.parametrize(
    ("info", "dtype", "unit"),
    [
        ({"depth_min": 0.01, "depth_max": 10.0, "shift": 3.5, "use_log": True}, "uint16", "mm"),
        ({"depth_min": 0.05, "depth_max": 5.0, "use_log": False}, "uint16", "mm"),
        ({"depth_min": 0.05, "depth_max": 0.55, "use_log": False}, "float32", "m"),  # finer than a millimetre
    ],
)
def test_depth_videos_become_depths(tmp_path: Path, info: dict[str, Any], dtype: str, unit: str) -> None:
    """The formula is LeRobot's, for single codes."""
    lerobot_v2(tmp_path / "s")
    codes = depth_video(tmp_path / "s", **{f"video.{k}": v for k, v in info.items()})
    index, episodes, _ = converted(tmp_path / "s", tmp_path / "out")
    field = index.tasks[0].field(TOP)
    scale = 1000 if unit == "mm" else 1
    assert (field.dtype, field.shape, field.unit) == (dtype, (64, 70, 1), unit)
    np.testing.assert_allclose(
        [*field.low, *field.high], [info["depth_min"] * scale, info["depth_max"] * scale], rtol=1e-6
    )  # type: ignore[misc]
    low, high, shift = info["depth_min"], info["depth_max"], info.get("shift", 3.5)
    share = codes[1].astype(np.float64) / 4095
    if info["use_log"]:
        metres = np.exp(np.log(low + shift) + share * (np.log(high + shift) - np.log(low + shift))) - shift
    else:
        metres = low + share * (high - low)
    found = episodes["s/000001"].fields[TOP][..., 0]
    np.testing.assert_allclose(found, metres * scale, atol=0.501 if unit == "mm" else 1e-6)


def test_depth_videos_without_a_range_keep_their_codes(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "s")
    codes = depth_video(tmp_path / "s")
    index, episodes, report = converted(tmp_path / "s", tmp_path / "out")
    field = index.tasks[0].field(TOP)
    assert (field.dtype, field.low, field.high, field.unit) == ("uint16", (0.0,), (4095.0,), "")
    np.testing.assert_array_equal(episodes["s/000002"].fields[TOP][..., 0], codes[2])
    assert any("does not say which depths" in n for n in report.notes)


def test_a_later_video_of_8_bits_is_refused(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "s")
    path = tmp_path / f"s/videos/chunk-000/{TOP}/episode_000001.mp4"
    before = path.read_bytes()
    depth_video(tmp_path / "s")
    path.write_bytes(before)
    with pytest.raises(DataError, match=r"episode_000001\.mp4: its frames are yuv420p, but 4,096 levels of grey"):
        converted(tmp_path / "s", tmp_path / "out")


@pytest.mark.parametrize(
    "names", [["c", "h", "w"], ["C", "H", "W"], ["rgb", "height", "width"], ["channels", "height", "width"], None]
)
def test_the_pictures_own_size_decides(tmp_path: Path, names: list[str] | None) -> None:
    expected = lerobot_v2(tmp_path / "s")
    edit_info(tmp_path / "s", lambda i: i["features"][TOP].update(names=names, shape=[3, 48, 40]))
    index, episodes, _ = converted(tmp_path / "s", tmp_path / "out", mapping={"fields": {TOP: {"encoding": "raw"}}})
    assert index.tasks[0].field(TOP).shape == (64, 64, 3)
    np.testing.assert_array_equal(episodes["s/000001"].fields[TOP], expected["s/000001"][1][TOP])


def test_resize_is_for_images_too(tmp_path: Path) -> None:
    depth = millimetres()
    colours = [np.repeat((d // 21).astype(np.uint8), 3, axis=-1) for d in depth]
    for name, images in (("depth", depth), ("colour", colours)):
        folder = tmp_path / name
        lerobot_v2(folder)
        add_images(folder, [[picture(d) for d in rows] for rows in images], [24, 32, images[0].shape[-1]])
        _, episodes, _ = converted(folder, tmp_path / f"{name}-out", mapping={"options": {"resize": [12, 16]}})
        found = episodes[f"{name}/000001"].fields
        assert found[TOP].shape[1:] == (12, 16, 3)
        if name == "depth":  # no depth appears that is not in the picture
            np.testing.assert_array_equal(found[DEPTH], depth[1][:, 1::2, 1::2])
        else:
            means = colours[1].reshape(-1, 12, 2, 16, 2, 3).mean(axis=(2, 4))
            np.testing.assert_allclose(found[DEPTH], means, atol=1)


# ---- values and rows


def test_integers_that_do_not_fit_the_declared_dtype_are_refused(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "s")
    columns = [pa.array(np.arange(n) + (2**31 if number == 1 else 0)) for number, n in enumerate(LENGTHS)]
    add_feature(tmp_path / "s", "count", {"dtype": "int32", "shape": [1], "names": None}, columns)
    with pytest.raises(DataError, match=r"episode s/000001: field 'count': the int64 value 2147483648 at \[0\]"):
        converted(tmp_path / "s", tmp_path / "out")

    mapping = {"fields": {"count": {"dtype": "int64"}}}
    index, episodes, _ = converted(tmp_path / "s", tmp_path / "wide", mapping=mapping)
    assert index.tasks[0].field("count").shape == ()
    assert episodes["s/000001"].fields["count"].tolist() == [2**31, 2**31 + 1, 2**31 + 2]


def test_the_order_of_rows_and_tables_does_not_matter(tmp_path: Path) -> None:
    expected = lerobot_v3(tmp_path / "s")
    mixed = np.random.default_rng(1).permutation(sum(LENGTHS[:2]))
    rewrite(tmp_path / "s/data/chunk-000/file-000.parquet", lambda table: table.take(mixed))
    rewrite(tmp_path / "s/meta/episodes/chunk-000/file-000.parquet", lambda table: table.take([2, 0, 1]))
    _, episodes, _ = converted(tmp_path / "s", tmp_path / "out")
    assert list(episodes) == sorted(expected)
    for key, (steps, fields) in expected.items():
        assert episodes[key].steps == steps
        for name, values in fields.items():
            np.testing.assert_array_equal(episodes[key].fields[name], values, key)


def test_a_wrong_number_of_rows_is_named(tmp_path: Path) -> None:
    lerobot_v3(tmp_path / "s")
    rewrite(tmp_path / "s/data/chunk-000/file-000.parquet", lambda table: table.slice(0, 7))
    with pytest.raises(DataError, match=r"file-000\.parquet, episode 1: has 2 rows.*lists 3"):
        converted(tmp_path / "s", tmp_path / "out")


def test_rows_between_two_frames_are_refused(tmp_path: Path) -> None:
    """Up to a quarter of the time between frames is rounding; beyond it, nobody knows which frame is meant."""
    for share, fits in ((0.2, True), (0.3, False)):
        folder = tmp_path / f"s{fits}"
        lerobot_v2(folder)
        times = pa.array((np.arange(LENGTHS[1]) * (0.1 + share / 20)).astype(np.float32))  # it drifts over two steps
        path = folder / "data/chunk-000/episode_000001.parquet"
        rewrite(path, lambda t, new=times: t.set_column(t.schema.get_field_index("timestamp"), "timestamp", new))
        if fits:
            converted(folder, tmp_path / "out")
        else:
            with pytest.raises(
                DataError, match=r"episode_000001\.mp4: no frame at 0\.2300 s; .* Row 2 needs one within 25 ms"
            ):
                converted(folder, tmp_path / "bad")


# ---- parts that are missing


def test_an_episode_without_a_place_of_its_video_is_malformed_alone(tmp_path: Path) -> None:
    lerobot_v3(tmp_path / "s")
    name = f"videos/{TOP}/from_timestamp"

    def forget(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, pa.array([0.0, None, 0.8]))

    rewrite(tmp_path / "s/meta/episodes/chunk-000/file-000.parquet", forget)
    _, episodes, report = converted(tmp_path / "s", tmp_path / "out", skip_bad=True)
    assert sorted(episodes) == ["s/000000", "s/000002"]
    assert TOP in report.bad[0].reason


@pytest.mark.parametrize("maker", [lerobot_v2, lerobot_v3])
def test_a_dropped_camera_needs_no_videos(tmp_path: Path, maker: Callable[[Path], Any]) -> None:
    maker(tmp_path / "s")
    for path in (tmp_path / "s/videos").rglob("*.mp4"):
        path.unlink()
    _, episodes, report = converted(
        tmp_path / "s", tmp_path / "out", mapping={"fields": {"observation.images.*": "drop"}}
    )
    assert len(episodes) == len(LENGTHS)
    assert not report.bad
    assert TOP not in episodes["s/000000"].fields


def test_the_report_counts_malformed_episodes_by_reason(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "s")
    for number in (0, 2):
        (tmp_path / f"s/videos/chunk-000/{TOP}/episode_{number:06d}.mp4").unlink()
    _, _, report = converted(tmp_path / "s", tmp_path / "out", skip_bad=True)
    lines = str(report).splitlines()
    at = next(i for i, line in enumerate(lines) if "2 malformed episodes were left out" in line)
    assert lines[at + 1] == "  2 × *.mp4: is missing, though the metadata lists episode N"
    assert "episode_000000.mp4: is missing" in lines[at + 2]


def test_values_outside_their_bounds_are_counted(tmp_path: Path) -> None:
    expected = lerobot_v2(tmp_path / "s")
    mapping = {"fields": {"action": {"low": -1, "high": [1, 2]}, TOP: {"low": 0, "high": 180}}}
    _, _, report = converted(tmp_path / "s", tmp_path / "out", mapping=mapping)
    actions = np.concatenate([fields["action"] for _, fields in expected.values()])
    beyond, total = int(((actions < -1) | (actions > [1, 2])).sum()), actions.size
    assert beyond
    assert any(f"s, action: {beyond} of {total} values" in n and "low -1, high 1 2" in n for n in report.notes)
    bright = sum(int((fields[TOP] > 180).sum()) for _, fields in expected.values())
    assert any(f"s, {TOP}: {bright:,} of " in n for n in report.notes)


def test_inspect_prints_bounds_and_unit(tmp_path: Path) -> None:
    from tiphys.launch.display import summary

    lerobot_v2(tmp_path / "s")
    mapping = {"fields": {"action": {"low": -1, "high": [1, 2], "unit": "rad"}, TOP: "drop"}}
    converted(tmp_path / "s", tmp_path / "out", mapping=mapping)
    (line,) = [x for x in summary(inspect(str(tmp_path / "out"))).splitlines() if " action " in x]
    assert [part.strip() for part in line.split("│")][-5:-1] == ["-1", "1, 2", "–", "rad"]
