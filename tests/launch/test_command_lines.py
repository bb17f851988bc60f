"""Every command and every option of `tiphys` works when it is typed: each stands in a command line that is run here."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.dataio.convert.convert_sources import lerobot_v2
from tests.launch.small_recipe import GOLDEN, small_recipe
from tiphys.dataio.collect import Players
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.inplace.build import index_lerobot
from tiphys.dataio.shards import ShardWriter
from tiphys.launch import cli, quickstart, supervise
from tiphys.launch.check import check
from tiphys.launch.statuses import Status
from tiphys.launch.supervise import Job
from tiphys.pretrain import checkpoint_snapshot

pytest.importorskip("gymnasium", reason="needs the envs extra")
pytest.importorskip("minigrid", reason="needs the envs extra")
import tests.pretrain.acting.acting_fixtures as acting
import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.serving.serving_fixtures import serving
from tests.pretrain.test_checkpoint import part
from tiphys.dataio import environments
from tiphys.pretrain.publish import publish
from tiphys.pretrain.serving.served import Served, Settings
from tiphys.pretrain.serving.server import Door, Server

pytestmark = pytest.mark.envs

_scored = Players.scored
# Run in this order in one folder; see `folder` for what is there. Words are split as by a shell.
LINES = """
quickstart --datasets demos --scale 0.01 --processes 1 --verbose train.steps=2
train small.yaml train.steps=3 --processes 2 --port 29871 --launcher "--bind_cores_to_rank" --verbose
train small.yaml --hostfile hosts
train small.yaml --processes 1 --accept-changed-data
train small.yaml --on slurm --nodes 2 --processes 1 --slurm "--partition=gpu --mem=8G" --dry-run
submit small.yaml --nodes 1 --processes 2 --slurm "--time=1:00:00 --mem=8G" --dry-run
check small.yaml train.steps=5 --world 2
check small.yaml --no-data
layout small.yaml train.steps=3 --gpus 2 --memory 4GiB --device cpu --json
layout small.yaml --memory 4GiB --calibrate
mixture run show
mixture run set 0=0.5 --at 7
mixture run add grid=0.25 --like 0
report run
report run other --out comparison.html
checkpoint list run --json
checkpoint verify run
checkpoint inspect run
objectives
objectives dt --json
tokens small.yaml --step 1 --row 1 --html row.html
collect CartPole-v1 --to new --episodes 2 --seed 5 --noise 0.1 --record executed --processes 1
collect CartPole-v1 --to zipped --episodes 1 --processes 1 --policy policy --trust-policy
dataset scores zipped --episodes 1 --processes 1 --policy policy --trust-policy
collect CartPole-v1 --to asked --episodes 1 --policy both --objective dt --target-return q0.5 --prompt cart:0 --goal [0,0,0,0]
environments cart
convert source converted --from npz --map map.yaml --skip-bad --processes 1 --on local
export cart exported --to npz
inspect cart --json
inspect grid --episode 0
inspect pictures --episode 0 --picture frames.png
verify cart --repair
verify robot --full
index tars
index tars tars-index
index robot robot-index --crc --tolerance 0.02 --skip-bad
check raw.yaml
dataset merge all cart grid
dataset append all pendulum pictures
dataset split all most rest --share 0.5
dataset filter all few --tasks CartPole* --min-return 0 --top 1 --min-steps 1
dataset filter grid done --success
dataset lengths small.yaml train.steps=3
dataset scores cart --tasks CartPole* --episodes 2 --processes 1 --modules gymnasium
loader-bench cart --steps 2 --rows 2 --window 3 --cache 1MiB --json
label idm cart labelled --device cpu
bootstrap boot cart drawn --keep 0.5 --draws 2 --windows 2 --validation 0.1 --seed 3 --device cpu
say book "the cat" --task book --tokens 4 --temperature 0.5 --top-p 0.9 --seed 2 --device cpu
say captions "" --observation picture.png --tokens 4
evaluate policy --tasks CartPole-v1 --episodes 2 --seed 1000005 --processes 1 --no-sample --out found.json --device cpu
evaluate policy --tasks CartPole-v1 --episodes 1 --processes 1 --pictures strips --videos 1
evaluate policy --tasks CartPole-v1 --episodes 1 --processes 1 --demonstrations cart --modules gymnasium
evaluate both --episodes 1 --processes 1 --objective dt bc --target-return CartPole-v1=2 --target-returns best --prompt cart
evaluate both --tasks CartPole-v1 --episodes 1 --processes 1 --goal [0,0,0,0]
evaluate filling --episodes 1 --processes 1 --objective unimask gdt --query rc --future CartPole-v1=cart:1
collect CartPole-v1 --to filled --episodes 1 --policy filling --objective gdt --future cart:0
collect CartPole-v1 --to queried --episodes 1 --policy filling --objective unimask --query rc
evaluate policy --tasks CartPole-v1 --episodes 1 --processes 1 --server ws://127.0.0.1:29872 --api-key-file key
serve policy --task CartPole-v1 --map state=observation --execute 1 --port 0 --sessions 8 --batch 4 --wait 2ms --device cpu
serve followed --follow --host 0.0.0.0 --open --port 0 --sample --seed 3
serve policy --port 0 --no-sample
serve policy --host 0.0.0.0 --port 0 --api-key-file key
publish policy published --public --take-over
evaluate published --tasks CartPole-v1 --episodes 1 --processes 1 --follow --every 1
"""


BOOK = TaskSpec("book", (FieldSpec("text", "text", "text", "str", per="episode"),))


def scored_by_few(players: Players, spec: TaskSpec, episodes: int, **options: Any) -> TaskSpec:
    return _scored(players, spec, min(episodes, 5), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("commands")
    for name in ("cart", "grid", "pendulum"):
        shutil.copytree(GOLDEN / name, place / name)
    publish(acting.folder(place / "policy"), str(place / "followed"))
    both = fixtures.make_each([environments.spec(acting.CART)], ["bc", "dt"], context=60)
    values = json.loads((acting.folder(place / "both", both) / "processor.json").read_text())
    for objective in values["objectives"].values():
        objective["takes_goal"] = True
    (place / "both" / "processor.json").write_text(json.dumps(values))
    (place / "small.yaml").write_text(small_recipe("cart"))
    acting.folder(place / "idm", fixtures.make_each([environments.spec(acting.CART)], ["idm"], context=60))
    acting.folder(place / "boot", fixtures.make_each([environments.spec(acting.CART)], ["boot"], context=60))
    (place / "key").write_text("secret\n")
    acting.folder(place / "captions", fixtures.make_each([fixtures.CAPTION], ["gato"], context=40))
    Image.new("RGB", (16, 16)).save(place / "picture.png")
    acting.folder(place / "book", fixtures.make_each([BOOK], ["gato"], context=60))
    acting.folder(
        place / "filling", fixtures.make_each([environments.spec(acting.CART)], ["unimask", "gdt"], context=120)
    )
    (place / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (place / "run").mkdir()
    (place / "run" / "recipe.yaml").write_text(small_recipe("cart"))
    line = {"step": 1, "rows": 4, "tokens": 9, "loss": 1.0, "seconds": 1.0, "data_wait": 0.1}
    (place / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    snapshot = part(1)
    snapshot.state |= {"recipe": {"name": "small"}, "hash": "a", "datasets": ["d"], "loader": {"step": 1, "log": []}}
    checkpoint_snapshot.write(snapshot, place / "run")
    shutil.copytree(place / "run", place / "other")
    (place / "source").mkdir()
    observations = np.zeros((5, 2), np.float32)
    np.savez(place / "source" / "a.npz", action=np.zeros((4, 1), np.float32), observation=observations)
    (place / "map.yaml").write_text("task: drive\n")
    pictures(place / "pictures")
    lerobot_v2(place / "robot")
    index_lerobot(str(place / "robot"), str(place / "robot.tiphys"))
    lerobot_v2(place / "raw")
    (place / "raw.yaml").write_text(small_recipe("raw"))
    images(place / "tars")
    return place


def pictures(place: Path) -> None:
    """A dataset with a camera."""
    fields = (
        FieldSpec("observation.image", "observation", "image", "uint8", (16, 16, 3)),
        FieldSpec("action", "action", "discrete", "int64", (), values=2),
    )
    task = TaskSpec("camera", fields)
    with ShardWriter(str(place), [task]) as writer:
        values = {"observation.image": np.zeros((4, 16, 16, 3), np.uint8), "action": np.zeros(3, np.int64)}
        writer.write(Episode("one", "camera", values, 3))
        writer.close()


def images(place: Path) -> None:
    """A tar of pictures with captions, as others write them."""
    place.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(place / "000000.tar", "w") as tar:
        for name, content in (("0.png", picture.getvalue()), ("0.txt", b"a black square")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


class Launched:
    """Stands for the supervisor: it checks the recipe of a job, as the real one lets its child do, and starts nothing."""

    jobs: list[Job] = []

    @classmethod
    def supervise(cls, job: Job) -> Status:
        asked = dict(job.check)
        asked.pop("traceback")
        recipe = asked.pop("recipe")
        check(recipe, asked.pop("overrides"), data=Path(recipe).stem != "quickstart", **asked)  # nothing was collected
        cls.jobs.append(job)
        return Status.DONE


async def serves_nobody(self: Server, stop: Any, ready: Callable[[], None]) -> None:
    """Stands for `Server.run`, which ends with a signal."""
    ready()


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_the_line_works(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(supervise, "supervise", Launched.supervise)
    if line.startswith("quickstart"):
        monkeypatch.setattr(quickstart, "_collect", lambda *arguments, **options: None)
    elif not line.startswith("train"):
        monkeypatch.undo()
        monkeypatch.chdir(folder)
    if line.startswith("serve"):
        monkeypatch.setattr(Server, "run", serves_nobody)
    monkeypatch.setattr(Players, "scored", scored_by_few)  # policies that fill in plans are slow
    Launched.jobs.clear()
    door = Door(port=29872, api_key="secret")
    with serving(Served.load("policy", Settings()), door) if "--server" in line else nullcontext():
        status = cli.main(shlex.split(line))
    said = capsys.readouterr()
    assert status == Status.DONE, said.err
    assert line.split()[0] not in ("quickstart", "train") or "--dry-run" in line or len(Launched.jobs) == 1
    for word in (
        "row.html",
        "found.json",
        "frames.png",
        "published",
        "labelled",
        "drawn",
        "comparison.html",
        "done",
        "few",
        "strips",
    ):
        assert word not in line.split() or (folder / word).exists()


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """(words of a command, its options and its choices of positional words), of every command."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in below:
        for name, sub in action.choices.items():
            yield from commands(sub, (*words, name))
    if not below:
        own = {a.option_strings[-1] for a in parser._actions if a.option_strings}
        choices = {str(c) for a in parser._actions if not a.option_strings for c in a.choices or ()}
        yield " ".join(words), (own | choices) - {"--help", "--traceback"}


def test_every_command_and_every_option_stands_in_a_line() -> None:
    missing = []
    for command, wanted in commands(cli._parser()):
        lines = [line for line in LINES.strip().splitlines() if line == command or line.startswith(f"{command} ")]
        used = {word for line in lines for word in shlex.split(line)}
        missing += [f"{command} {word}" for word in sorted(wanted - used)] if lines else [command]
    assert missing == []


@pytest.mark.parametrize("command", [name for name, _ in commands(cli._parser())])
def test_every_command_shows_a_traceback_when_it_is_asked_to(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after the command, and never by itself."""
    line = next(
        shlex.split(line)
        for line in LINES.strip().splitlines()
        if line.split()[: len(command.split())] == command.split()
    )
    name = cli._parse(cli._parser(), line).command

    def fail(args: Any) -> int:
        raise FileNotFoundError(2, "No such file or directory", "there.txt")

    monkeypatch.setattr(f"tiphys.launch.commands.{name}", fail)
    for words, shown in ((line, False), (["--traceback", *line], True), ([*line, "--traceback"], True)):
        assert cli.main(words) == Status.REFUSED
        said = capsys.readouterr().err
        assert ("Traceback" in said) == shown
        assert said.endswith("tiphys: there.txt: No such file or directory\n")
