"""`~` is the home folder wherever a path is taken."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import Store
from tiphys.launch.cli import _PATHS, _parse, _parser
from tiphys.pretrain.publish import publish


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from arguments(child)
        else:
            yield action


def test_every_argument_that_is_a_path_is_expanded():
    told = re.compile(
        r"\b(folder|file|zip|dataset|datasets|URL|hostfile|path) (of|or|for|to|that)\b|YAML\)|^DeepSpeed hostfile|HTML"
    )
    valued = (a for a in arguments(_parser()) if not isinstance(a, argparse._StoreTrueAction))
    assert {a.dest for a in valued if told.search(a.help or "")} <= _PATHS
    assert {a.dest for a in arguments(_parser())} >= _PATHS


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["collect", "x", "--to=~/d"], "to", "/home/me/d"),
        (["dataset", "merge", "~/c", "~/a", "s3://b/~"], "datasets", ["/home/me/a", "s3://b/~"]),
        (["evaluate", "~/run", "--out=~/e.json"], "out", "/home/me/e.json"),
        (["train", "~/r.yaml", "--hostfile=~/hosts"], "hostfile", "/home/me/hosts"),
        (["quickstart", "--datasets=~/q"], "datasets", "/home/me/q"),
    ],
)
def test_the_command_line(monkeypatch, words, name, value):
    monkeypatch.setenv("HOME", "/home/me")
    assert getattr(_parse(_parser(), words), name) == value


def test_a_user_who_does_not_exist_is_an_error_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        _parse(_parser(), ["report", "~nobody-here/run"])
    assert "~nobody-here has no home folder" in capsys.readouterr().err


def test_stores_sources_and_policies(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Store("~/data").write("a.txt", b"x")
    assert (tmp_path / "data" / "a.txt").read_bytes() == b"x"
    assert Store("~/data").url == f"{tmp_path}/data"
    assert Source("~/data").files == ["a.txt"]
    for url in ("file://~/data", "file://data"):
        for opened in (Store, Source):
            with pytest.raises(DataError, match="a file URL holds a complete path"):
                opened(url)
    with pytest.raises(DataError, match=f"{tmp_path}/nothing is not a policy"):
        publish("~/nothing", "~/to")
    assert not (tmp_path / "~").exists()
