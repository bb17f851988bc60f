"""`checked_cast` keeps every value or names the first that does not fit. Python's own numbers are the oracle."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tiphys.dataio.casting import checked_cast
from tiphys.dataio.episode import DataError

DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64".split()
INTEGERS = [0, 1, 2, -1, 2049, 2**53 + 1, -(2**63)]
INTEGERS += [
    sign * 2**bits + more for bits in (7, 8, 15, 16, 24, 31, 32, 63) for sign in (1, -1) for more in (-1, 0, 1)
]
FLOATS = [0.5, -0.5, -0.0, 1e-320, 65504.0, 65520.0, 3.4e38, 1e300, np.inf, -np.inf, np.nan]
FLOATS += [sign * 2.0**bits for bits in (31, 32, 63, 64) for sign in (1, -1)]


def _fits(value: Any, dtype: str) -> bool:
    """Whether the dtype holds a Python number; a float may be rounded by a smaller float, but must stay finite."""
    kind = np.dtype(dtype).kind
    finite = not isinstance(value, float) or np.isfinite(value)
    if kind == "b":
        return value in (0, 1)
    if kind in "iu":
        limits = np.iinfo(dtype)
        return bool(finite and value == int(value) and limits.min <= int(value) <= limits.max)
    with np.errstate(all="ignore"):
        out = float(np.array(value).astype(dtype))
    if isinstance(value, float):
        return not finite or bool(np.isfinite(out))
    return bool(np.isfinite(out)) and Fraction(out) == Fraction(int(value))


@pytest.mark.parametrize("source", DTYPES)
def test_a_cast_keeps_the_value_or_is_refused(source: str) -> None:
    for number in [*INTEGERS, *FLOATS]:
        try:
            with np.errstate(all="ignore"):
                array = np.array([number], source)
        except (OverflowError, ValueError):
            continue
        for target in DTYPES:
            try:
                out = checked_cast(array, target, "f")
            except DataError:
                assert not _fits(array.item(), target), (source, number, target)
                continue
            assert out.dtype == target
            assert _fits(array.item(), target), (source, number, target)


def test_the_error_names_place_value_and_index() -> None:
    with pytest.raises(DataError, match=r"a\.npz, x: the int64 value 70000 at \[1, 0\] does not fit uint16; .*mapping"):
        checked_cast(np.array([[1], [70000], [80000]]), np.uint16, "a.npz, x")


def test_an_array_of_the_same_dtype_is_not_copied() -> None:
    array = np.zeros(3, np.uint8)
    assert checked_cast(array, "uint8", "f") is array
    assert checked_cast(array.astype(">i4"), "<i4", "f").tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [np.array(["1"]), np.array([1j])])
def test_only_numbers_are_cast(value: np.ndarray) -> None:
    with pytest.raises(DataError, match="cannot become"):
        checked_cast(value, np.float32, "f")
