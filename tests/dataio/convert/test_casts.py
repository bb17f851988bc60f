"""No converter changes a value by a cast: it keeps the value, or says which one does not fit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.convert_sources import picture
from tests.dataio.convert.test_convert_formats import reader
from tiphys.dataio.convert import convert
from tiphys.dataio.convert.converter import BadEpisode
from tiphys.dataio.convert.exported import restore
from tiphys.dataio.convert.limits import decode_image
from tiphys.dataio.convert.rlds_values import _images, _tensors
from tiphys.dataio.convert.tfds import Feature
from tiphys.dataio.convert.zarr import _as_image
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec


def npz(folder: Path, *files: dict[str, Any]) -> str:
    folder.mkdir()
    for number, arrays in enumerate(files):
        np.savez(folder / f"{number}.npz", **{"actions": np.arange(3), **arrays})
    return str(folder)


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        (np.zeros(3, np.uint8), np.array([1, 300, 400]), r"the int64 value 300 at \[1\] does not fit uint8"),
        (np.zeros(3, np.int32), np.array([1, 2, 2**31]), r"the int64 value 2147483648 at \[2\] does not fit int32"),
        (np.zeros(3, np.int64), np.array([1.0, 2.5, 3.0]), r"the float64 value 2\.5 at \[1\] does not fit int64"),
        (
            np.zeros(3, np.float32),
            np.array([1.0, 1e39, 3.0]),
            r"the float64 value 1e\+39 at \[1\] does not fit float32",
        ),
        (
            np.zeros(3, np.float32),
            np.array([0, 2**24 + 1, 3]),
            r"the int64 value 16777217 at \[1\] does not fit float32",
        ),
    ],
)
def test_a_later_file_wider_than_the_first_is_refused(tmp_path: Path, first: Any, later: Any, message: str) -> None:
    """The fields are inferred from the first files, of which there are more than the converter looks at."""
    source = npz(tmp_path / "s", *[{"state": first}] * 20, {"state": later})
    (tmp_path / "s/20.npz").rename(tmp_path / "s/zz.npz")
    with pytest.raises(DataError, match=rf"s/zz.*'observation'.*{message}"):
        convert(source, str(tmp_path / "out"), processes=1)


def test_the_dtype_of_a_mapping_file_must_hold_the_values(tmp_path: Path) -> None:
    source = npz(tmp_path / "s", {"state": np.array([1.0, 2.0, 3e5])})
    with pytest.raises(DataError, match=r"300000\.0 at \[2\] does not fit uint16"):
        convert(source, str(tmp_path / "out"), processes=1, mapping={"fields": {"observation": {"dtype": "uint16"}}})
    convert(source, str(tmp_path / "new"), processes=1, mapping={"fields": {"observation": {"dtype": "int32"}}})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"terminated": np.array([0, 0, 2])}, r"terminated: the int64 value 2 at \[2\] does not fit bool"),
        ({"terminated": np.array([0, np.nan, 1])}, r"terminated: the float64 value nan at \[1\] does not fit bool"),
        ({"episode_lengths": np.array([1.5, 1.5])}, r"lengths of the episodes: the float64 value 1\.5 at \[0\]"),
    ],
)
def test_flags_and_lengths_are_not_rounded(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    converter = reader(Path(npz(tmp_path / "s", arrays)), "npz")
    found: list[str] = []
    try:
        found += [str(i) for p in converter.pieces() for i in converter.episodes(p) if isinstance(i, BadEpisode)]
    except DataError as error:
        found.append(str(error))
    assert found
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found[0])


def test_rlds_pictures_and_tensors_keep_their_values() -> None:
    deep = picture(np.full((16, 16, 1), 300, np.uint16))
    with pytest.raises(DataError, match=r"the uint16 value 300 at .* does not fit uint8"):
        _images([deep], Feature("steps/depth", "image", "uint8", (16, 16, 1)), "x")
    assert (_images([deep], Feature("steps/depth", "image", "uint16", (16, 16, 1)), "x") == 300).all()
    numbers = np.array([1, 2], "<u2")
    tensor = Feature("steps/t", "tensor", "uint16", (2,), encoding="bytes")
    assert _tensors([numbers.tobytes()], tensor, None, "x").tolist() == [[1, 2]]


def test_pictures_of_floats_must_be_bytes() -> None:
    whole = np.full((1, 16, 16, 3), 255.0)
    assert _as_image(whole, "img", "x").dtype == np.uint8
    with pytest.raises(DataError, match=r"256\.0 at .* does not fit uint8; images of floats"):
        _as_image(whole + 1, "img", "x")


def test_colours_of_16_bits_are_refused() -> None:
    import av

    frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 1000, np.uint16), format="rgb48be")
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 16, 16, "rgb48be", Fraction(1)  # type: ignore[attr-defined, assignment]
    (packet,) = codec.encode(frame)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="colours of 16 bits"):
        decode_image(bytes(packet), "x")


def test_values_of_an_export_must_fit_their_field() -> None:
    task = TaskSpec("t", (FieldSpec("goal", "info", "discrete", "int32", (), per="episode"),))
    data = {"id": "a", "task": "t", "steps": 1, "success": None, "agent": "", "info": {}, "texts": {}, "rows": {}}
    assert restore({**data, "values": {"goal": 3}}, {}, task, "x").fields["goal"] == 3
    with pytest.raises(DataError, match=r"x, goal: the float64 value 3\.5 does not fit int32"):
        restore({**data, "values": {"goal": 3.5}}, {}, task, "x")
