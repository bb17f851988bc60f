"""Files are written atomically."""

import json
import os

import numpy as np
import pytest

from tiphys.dataio.atomic import atomic_path, to_json, write_json
from tiphys.dataio.format.rows import plain


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"tasks": {}})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(file, {"tasks": {"a": 1}})
    assert json.loads(file.read_text()) == {"tasks": {}}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_file_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file") as path:
            path.unlink()
            path.write_bytes(b"x")
            path.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_values_that_json_cannot_hold_become_null_or_their_names():
    value = {"a": [np.nan, (np.float32(np.inf),)], "b": -np.inf, "c": 1.5}
    assert json.loads(to_json(value, default=plain)) == {"a": [None, [None]], "b": None, "c": 1.5}
    exact = json.loads(to_json(value, exact=True, default=plain))
    assert exact == {"a": ["NaN", ["Infinity"]], "b": "-Infinity", "c": 1.5}
    assert np.array_equal(np.asarray(exact["a"][0], np.float32), np.float32(np.nan), equal_nan=True)


def test_values_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
