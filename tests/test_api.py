"""`import tiphys` is cheap, and offers what it says."""

import subprocess
import sys

import pytest

import tiphys


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", f"import sys, tiphys; {code}"], check=True)


def test_the_import_is_cheap():
    _run("dir(tiphys); assert not {'torch', 'numpy', 'omegaconf', 'pyarrow', 'deepspeed'} & set(sys.modules)")


def test_the_data_side_needs_no_torch():
    _run("tiphys.EpisodeIndex, tiphys.TrajectoryLoader, tiphys.Objectives; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("name", tiphys.__all__)
def test_every_name_is_there_and_documented(name):
    assert getattr(tiphys, name).__doc__


def test_version_and_unknown_names():
    assert tiphys.__version__
    with pytest.raises(AttributeError, match="'tiphys' has no attribute 'Lodaer'"):
        tiphys.Lodaer  # noqa: B018
