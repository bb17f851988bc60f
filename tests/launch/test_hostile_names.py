"""No command lets names in data control the terminal: tasks, fields, ids, agents, texts, keys of samples."""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.launch.small_recipe import small_recipe
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.messages import logger, say
from tiphys.dataio.shards import ShardWriter
from tiphys.launch import cli
from tiphys.recipes.load import load_recipe, to_yaml

NAME = "a\x1b[2J\x1b]8;;file:///etc/passwd\x07b\x9b1m\u202ec\rd"
TASK = TaskSpec(
    NAME,
    (
        FieldSpec("observation.x", "observation", "continuous", "float32", (3,)),
        FieldSpec("mission", "text", "text", "str", per="episode"),
        FieldSpec("action", "action", "discrete", "int64", values=5),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
    environment=f"Env{NAME}",
)
# Commands that no data of a stranger reaches before another one of these has read it, or that need minutes
NOT_WALKED = {
    "quickstart": "its data are its own",
    "train": "a rank prints with `say`; test_say_and_logs",
    "collect": "its tasks are named by the user",
    "environments": "lists what is installed",
    "objectives": "reads no data",
    "evaluate": "prints the table of `tests/dataio/test_messages.py`",
    "publish": "prints where to",
    "serve": "prints what clients send with `say`; tests/pretrain/serving/test_server.py",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a broken copy, tars of others, an NPZ, a recipe and a run, all with hostile names."""
    folder, rng = tmp_path_factory.mktemp("hostile"), np.random.default_rng(0)
    for name in ("data", "broken"):
        with ShardWriter(str(folder / name), [TASK]) as writer:
            for i in range(6):
                fields = {
                    "observation.x": rng.normal(size=(4, 3)).astype(np.float32),
                    "mission": NAME,
                    "action": rng.integers(0, 5, 4),
                    "reward": np.ones(4, np.float32),
                }
                writer.write(Episode(f"{NAME}{i}", NAME, fields, 4, agent=NAME))
    (shard,) = (folder / "broken" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    (folder / "foreign").mkdir()
    with tarfile.open(folder / "foreign" / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, body in ((f"x{NAME}.png", picture.getvalue()), (f"y{NAME}.png", b"none"), (f"z{NAME}.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    np.savez(folder / "source.npz", **{f"x{NAME}": np.zeros((4, 2), np.float32), "action": np.zeros(4, np.int64)})
    run = folder / "run"
    run.mkdir()
    recipe = yaml.safe_load(small_recipe(folder / "data")) | {"run": {"dir": str(run)}, "name": f"n{NAME}"}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    (run / "recipe.yaml").write_text(to_yaml(load_recipe(folder / "r.yaml")))
    event = {"step": 1, "weights": [1.0], "why": NAME}
    (run / "plan.jsonl").write_text(json.dumps(event) + "\n")
    (run / "mixture.jsonl").write_text(f'{{"weights": {{"{NAME}": 1}}, "x": "\x1b[2J"\n')
    return folder


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for parser in cli._subparsers(cli._parser()):
        if parser.get_default("command"):
            yield str(parser.get_default("command")), parser


LINES = [
    "inspect data",
    "inspect data --json",
    "inspect data --episode 1",
    "verify data",
    "verify broken",
    "index foreign",
    "convert source.npz converted --from npz",
    "convert foreign images --from webdataset --skip-bad",
    "convert foreign images --from webdataset",
    "export data exported --to npz",
    "export data exported-lerobot --to lerobot",
    "export data exported-minari --to minari",
    "dataset merge merged data",
    "dataset append merged data",
    "dataset split data one two --share 0.5",
    "dataset filter data filtered --min-return 100",
    "dataset filter data filtered --tasks x",
    "dataset lengths r.yaml",
    "dataset scores data",
    "dataset scores data --tasks x",
    "loader-bench data --steps 1 --rows 2 --window 2",
    "check r.yaml",
    "check r.yaml objectives.bc.fields=[x]",
    "tokens r.yaml",
    "layout r.yaml --gpus 1 --memory 80GiB",
    "tokens r.yaml --html page.html",
    "mixture run show",
    "mixture run set x=1",
    "mixture run add broken=1",
    "report run",
    "checkpoint list run",
    "label data data labelled",
    "bootstrap data data drawn --validation 0",
    "say data word",
    "say data word --observation data:0",
    "submit r.yaml --dry-run",
    "--traceback inspect broken/none",
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_prints_no_control_character(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    cli.main(line.split())
    printed = capsys.readouterr()
    assert printed.out + printed.err
    assert not re.findall(r"[^\n\t -~\u00a1-\u2027\u2030-\uffff]", printed.out + printed.err)


def test_every_command_is_walked() -> None:
    walked = {word for line in LINES for word in line.replace("-", "_").split()[:2]}
    assert {name.rpartition(".")[2].removesuffix("_job") for name, _ in commands()} - walked == set(NOT_WALKED)


def test_say_and_logs(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    say(NAME, error=True, start="\r", end="")
    assert capsys.readouterr().err == "\r" + "a\\x1b[2J\\x1b]8;;file:///etc/passwd\\x07b\\x9b1m\\u202ec\\rd"
    logger("tiphys.test").warning("of %s at %s", NAME, "https://user:secret@host/x?sig=secret")
    assert "\x1b" not in caplog.text
    assert "secret" not in caplog.text


def test_all_loggers_of_tiphys_are_clean() -> None:
    import_module("tiphys.dataio.loader")  # it imports most of those that log
    for name, found in logging.root.manager.loggerDict.items():
        if name.startswith("tiphys.") and isinstance(found, logging.Logger) and name in sys.modules:
            assert found.filters, name
