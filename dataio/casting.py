"""Casts that keep values. Every cast of data on its way into a dataset goes through `checked_cast`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError

_ADVICE = "declare a dtype that holds it (`dtype` of the field in a mapping file)"


def checked_cast(values: Any, dtype: Any, where: str, advice: str = _ADVICE) -> np.ndarray:
    """The values as `dtype`, if that keeps every one of them.

    Between floats, values may be rounded, but a finite value must stay finite. Every other cast must be exact: 3.0 fits int32,
    3.5, NaN and 2³¹ do not; 2²⁴ + 1 does not fit float32; only 0 and 1 fit bool.

    Parameters
    ----------
    values : array_like
        Booleans, integers or floats, of any shape.
    dtype : dtype_like
        The dtype to cast to: bool, an integer or a float.
    where : str
        File and field, for the message of an error.
    advice : str
        What the message tells the user to do.

    Returns
    -------
    numpy.ndarray
        An array of the same shape. It is `values` itself if that has the dtype already.

    Raises
    ------
    DataError
        If a value does not fit. The message gives the first one and its index.
    """
    array, dtype = np.asarray(values), np.dtype(dtype)
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in "biuf" or dtype.kind not in "biuf":
        raise DataError(f"{where}: values of {array.dtype} cannot become {dtype}; {advice}")
    with np.errstate(all="ignore"):
        out = array.astype(dtype)
    if dtype.newbyteorder("=") == array.dtype.newbyteorder("=") or _holds_all(array.dtype, dtype):
        return out
    wrong = _changed(array, out)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        at = f" at {list(index)}" if index else ""
        raise DataError(f"{where}: the {array.dtype} value {array[index]}{at} does not fit {dtype}; {advice}")
    return out


def checked_flags(values: Any, where: str) -> np.ndarray:
    """The values as bool. Raises DataError, as `checked_cast` does, if one is neither 0 nor 1."""
    return checked_cast(values, np.bool_, where, "a flag must be 0 or 1; correct the source")


def _holds_all(source: np.dtype, target: np.dtype) -> bool:
    """Whether the target has every value of the source. NumPy's rule for it lets 64-bit integers become float64."""
    inexact = target.kind == "f" and source.kind in "iu" and source.itemsize > 4
    return not inexact and bool(np.can_cast(source, target, "safe"))


def _changed(array: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Where the cast changed a value (between floats: made a finite one infinite)."""
    kinds = array.dtype.kind + out.dtype.kind
    if kinds == "ff":
        return np.isinf(out) & np.isfinite(array)
    with np.errstate(all="ignore"):
        differs = out.astype(array.dtype) != array
        # values beyond the range of an integer saturate or wrap, and may come back as they were
        if kinds[1] in "iu" and kinds[0] == "f":
            limits, wide = np.iinfo(out.dtype), array.astype(np.float64)
            return differs | ~(wide >= float(limits.min)) | ~(wide < 2.0 ** int(limits.max).bit_length())
        if kinds[1] == "f" and kinds[0] in "iu":
            wide = out.astype(np.float64)
            return differs | ~np.isfinite(wide) | (wide >= 2.0 ** int(np.iinfo(array.dtype).max).bit_length())
        if kinds[1] in "iu" and kinds[0] in "iu":
            return differs | ((out < 0) != (array < 0))
    return differs
