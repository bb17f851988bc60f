"""`import tiphys` is quick, and offers the public API."""

import subprocess
import sys

import pytest

import tiphys


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"import sys, tiphys; {code}"], check=True)


def test_import_loads_no_large_library():
    _run("dir(tiphys); assert not {'torch', 'numpy', 'omegaconf', 'pyarrow', 'deepspeed'} & set(sys.modules)")


def test_data_and_tokens_need_no_torch():
    _run("tiphys.EpisodeIndex, tiphys.TrajectoryLoader, tiphys.Objectives; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("name", tiphys.__all__)
def test_every_public_name_exists_and_is_documented(name):
    assert getattr(tiphys, name).__doc__


def test_version_and_unknown_name():
    assert tiphys.__version__
    with pytest.raises(AttributeError, match="'tiphys' has no attribute 'Lodaer'"):
        tiphys.Lodaer  # noqa: B018
