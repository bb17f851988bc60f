"""The command line explains itself, and its exit statuses say what happened."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tiphys.dataio.index import EpisodeIndex
from tiphys.launch import cli
from tiphys.launch.commands import runs
from tiphys.launch.statuses import Status
from tiphys.pretrain.tokens.paradigms import NOTHING

DATA = Path(__file__).parents[1] / "golden" / "data"


def parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from parsers(below, f"{name} {command}")


def test_every_argument_has_a_help_text_and_every_option_its_default() -> None:
    for name, parser in parsers(cli._parser(), "tiphys"):
        parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help, f"{name}: {action.dest}"
            if action.option_strings and action.nargs != 0:
                assert "(default: " in action.help or "(required)" in action.help, f"{name}: {action.dest}"


def test_every_command_exists_and_the_help_lists_all_statuses() -> None:
    for name, parser in parsers(cli._parser(), "tiphys"):
        command = parser.get_default("command")
        if command is not None:
            module, _, function = command.partition(".")
            assert hasattr(import_module(f"tiphys.launch.commands.{module}"), function), name
    text = cli._parser().format_help()
    assert all(f"{status.value}  {status.meaning}" in text for status in Status)


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("no"), Status.REFUSED),
        (FileNotFoundError("no"), Status.REFUSED),
        (KeyboardInterrupt(), Status.INTERRUPTED),
        (BrokenPipeError(), Status.BROKEN_PIPE),
    ],
)
def test_errors_of_the_user_have_a_status_and_no_traceback(
    error: BaseException, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(runs, "objectives", fail)
    assert cli.main(["objectives"]) == status


def test_a_command_line_that_is_not_valid_has_the_status_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == Status.USAGE
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == Status.USAGE


def test_append_takes_whole_names_of_datasets(tmp_path: Path) -> None:
    assert cli.main(["dataset", "merge", str(tmp_path / "all"), str(DATA / "cart")]) == Status.DONE
    assert (
        cli.main(["dataset", "append", str(tmp_path / "all"), str(DATA / "grid"), str(DATA / "pendulum")])
        == Status.DONE
    )
    parts = [EpisodeIndex.open(str(DATA / name)).episodes for name in ("cart", "grid", "pendulum")]
    assert EpisodeIndex.open(str(tmp_path / "all")).episodes == sum(parts)


def test_ctrl_c_ends_a_command_and_its_processes_without_a_traceback(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium", reason="needs the envs extra")
    words = ["collect", "CartPole-v1", "--to", str(tmp_path / "data"), "--episodes", "100000", "--processes", "2"]
    command = subprocess.Popen(
        [sys.executable, "-m", "tiphys", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )
    try:
        wait_until((tmp_path / "data" / "shards").is_dir)
        os.killpg(command.pid, signal.SIGINT)  # as a terminal does, also to the worker processes
        said = command.communicate(timeout=60)[1]
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == Status.INTERRUPTED
    assert said.splitlines()[-1] == "tiphys: stopped"
    assert "Traceback" not in said


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 400
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_table_of_paradigms_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["objectives"]) == 0
    summary = capsys.readouterr().out
    assert cli.main(["objectives", "dt"]) == 0
    whole = capsys.readouterr().out
    assert max(map(len, (summary + whole).splitlines())) <= 80
    assert cli.main(["objectives", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(f"{row['name']}: {row['source'][:20]}" in summary for row in rows)
    assert all(
        " ".join(text.split()) in " ".join(whole.split())
        for row in rows[1:2]
        for text in row.values()
        if text != NOTHING
    )
    assert cli.main(["objectives", "dr"]) == Status.REFUSED
    assert "Allowed: bc, dt, tt" in capsys.readouterr().err
