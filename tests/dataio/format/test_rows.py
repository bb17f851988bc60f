"""Rows of steps.npy: their dtype, their CRCs, and the constant that verifies any number of rows."""

import io
import json

import numpy as np
import pytest
from crc32c import crc32c

from tests.dataio.making import RICH, SMALL, observed, random_episode
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.rows import RowLayout, broken_row, check_task, pack_rows, row_dtype


def packed(steps=9, extra=True):
    episode = random_episode(RICH, "e", steps, np.random.default_rng(0), observed(RICH) if extra else ())
    return episode, pack_rows(RowLayout(RICH), episode)


def test_the_dtype_depends_on_the_task_alone_and_is_packed():
    dtype = row_dtype(RICH)
    assert dtype.names == (
        "_step", "_return_to_go", "_valid", "action", "gripper", "observation.grid", "observation.state", "reward",
        "terminated", "_crc",
    )  # fmt: skip
    assert dtype.itemsize == 4 + 4 + 1 + 8 + 8 + 9 + 20 + 4 + 1 + 4
    assert row_dtype(TaskSpec(**json.loads(json.dumps(RICH.to_dict())))) == dtype


def test_the_columns_hold_the_episode():
    episode, rows = packed()
    assert len(rows) == 10
    assert rows["_step"].tolist() == list(range(10))
    assert rows["_valid"].tolist() == [1] * 9 + [0]
    for t in range(10):
        assert rows["_return_to_go"][t] == pytest.approx(episode.fields["reward"][t:].sum(dtype=np.float64), abs=1e-6)
    assert np.array_equal(rows["observation.state"], episode.fields["observation.state"])
    assert np.array_equal(rows["action"][:9], episode.fields["action"])
    assert not rows["action"][9].any()


def test_every_row_has_the_crc_of_its_other_bytes():
    _, rows = packed()
    for row in rows:
        assert int(row["_crc"]) == crc32c(row.tobytes()[:-4])


@pytest.mark.parametrize("steps", [1, 7, 255, 256, 257, 700])
def test_intact_windows_pass_and_any_flipped_bit_is_found_in_its_row(steps):
    rng = np.random.default_rng(steps)
    rows = pack_rows(RowLayout(SMALL), random_episode(SMALL, "e", steps, rng))
    data, one = bytearray(rows.tobytes()), rows.dtype.itemsize
    for _ in range(20):
        low = int(rng.integers(0, steps))
        high = int(rng.integers(low + 1, steps + 1))
        window = memoryview(data)[low * one : high * one]
        assert broken_row(window, one) == -1
        bit = int(rng.integers(0, len(window) * 8))
        window[bit // 8] ^= 1 << bit % 8
        assert broken_row(window, one) == bit // 8 // one
        window[bit // 8] ^= 1 << bit % 8
    assert broken_row(memoryview(data)[:-1], one) >= 0


def test_rows_in_another_order_pass_the_crc_but_hold_their_number():
    _, rows = packed()
    assert broken_row(memoryview(rows[::-1].tobytes()), rows.dtype.itemsize) == -1
    assert rows[::-1]["_step"][0] == 9


@pytest.mark.parametrize(
    "change, message",
    [
        ({"action": np.zeros((3, 2), np.float32)}, "3"),
        ({"action": np.zeros((9, 3), np.float32)}, "shape"),
        ({"action": np.zeros((9, 2), np.float64)}, "float64"),
        ({"reward": None}, "missing"),
        ({"observation.state": np.zeros((8, 5), np.float32)}, "rows"),
    ],
)
def test_an_episode_that_does_not_fit_its_task_is_refused(change, message):
    episode, _ = packed()
    broken = Episode("e", "rich", {**episode.fields, **change}, 9)
    with pytest.raises(DataError, match=message):
        pack_rows(RowLayout(RICH), broken)


@pytest.mark.parametrize(
    "field",
    [
        FieldSpec("_crc", "info", "continuous", "float32"),
        FieldSpec("../x", "info", "continuous", "float32"),
        FieldSpec("a/b", "info", "continuous", "float32"),
        FieldSpec("steps", "info", "continuous", "float32"),
        FieldSpec("x", "info", "continuous", "object"),
        FieldSpec("x", "info", "continuous", "V9"),
        FieldSpec("x", "info", "continuous", "nonsense"),
        FieldSpec("x", "info", "continuous", "float32", (1 << 40,)),
        FieldSpec("x", "info", "continuous", "float32", (-1,)),
        FieldSpec("x", "text", "text", "str", (2,)),
    ],
)
def test_fields_that_cannot_be_stored_are_refused(field):
    with pytest.raises(DataError, match="task 't'"):
        check_task(TaskSpec("t", (field,)))


def test_numpy_can_load_the_member():
    from tiphys.dataio.format.sample import npy

    _, rows = packed()
    again = np.load(io.BytesIO(npy(rows)), allow_pickle=False)
    assert again.dtype == rows.dtype
    assert again.tobytes() == rows.tobytes()


def test_values_that_the_declared_dtype_cannot_hold_are_refused():
    """NumPy calls int64 -> float64 safe, and adds up rewards beyond the largest float32."""
    exact = TaskSpec("t", (FieldSpec("reward", "reward", "continuous", "float64"),))
    with pytest.raises(DataError, match=r"9007199254740993 at .* does not fit float64"):
        pack_rows(RowLayout(exact), Episode("a", "t", {"reward": np.array([0, 2**53 + 1])}, 2))
    with pytest.raises(DataError, match=r"sum of its rewards.*scale the rewards down"):
        pack_rows(RowLayout(exact), Episode("a", "t", {"reward": np.array([3e38, 3e38])}, 2))
