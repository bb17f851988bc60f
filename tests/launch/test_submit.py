"""The launcher's command lines reach every host unchanged, and nothing of the current folder changes them."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.processes import REPOSITORY
from tiphys.launch import submit
from tiphys.launch.train import main

SHOW = """
import json, os, sys
from tiphys.launch.submit import unpacked
names = ("PYTHONSAFEPATH", "PYTHONPATH", "PLANTED")
found = [sys.argv[1:], os.getcwd(), {name: os.environ.get(name) for name in names}, sys.path]
open(os.environ["MLFLOW_SHOWN"] + str(os.getpid()), "w").write(json.dumps(found))
"""
# As pdsh does with ssh: join the words after its options, and let a shell run them on each host.
PDSH = """#!/bin/bash
hosts=$5; shift 5
n=0
for host in ${hosts//,/ }; do (cd "$HOME" && env -i HOME="$HOME" PATH="$PATH" bash -c "${*//%n/$n}") & n=$((n + 1)); done
wait
"""
NOTHING: Any = {"processes": 0, "extra": [], "verbose": False, "options": [], "with_traceback": False}
SSH = "#!/bin/bash\necho 127.0.0.1\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hosts that are this machine. A rank writes its words, folder and settings to `shown…` instead of training."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    package = tmp_path / "shown"
    package.mkdir()
    (package / "show_words.py").write_text(SHOW)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{package}{os.pathsep}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_SHOWN", str(package / "words-"))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.setattr(submit, "TRAIN", ("--module", "show_words"))
    return tmp_path


def test_words_arrive_unchanged_and_the_current_folder_has_no_say(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cluster / "a b;touch $(echo 'x')"
    folder.mkdir()
    (folder / ".deepspeed_env").write_text("PLANTED=yes\n")
    for name in ("torch", "deepspeed", "json"):
        (folder / f"{name}.py").write_text(f"open({str(cluster / 'marker')!r}, 'w')\n")
    monkeypatch.chdir(folder)
    overrides = ["run.dir=a b", "name=$(touch x);'\"", "train.steps=3", "name=`id` \\ * ~ ü", "-x"]
    job = submit.job("my recipe.yaml", overrides, hostfile="../hosts", port=submit.free_port(), **NOTHING)
    words = [*job.words, *job.packed(job.ranks)]
    assert subprocess.run(words, env=dict(job.environment), cwd=job.folder, check=False).returncode == 0
    assert job.world == 2
    shown = [json.loads(file.read_text()) for file in (cluster / "shown").glob("words-*")]
    assert len(shown) == 2
    for words, _, settings, path in shown:
        assert submit.unpacked(words[0]) == (str(folder), ["my recipe.yaml", *overrides])
        assert len(words) == 1
        assert settings["PLANTED"] is None
        assert settings["PYTHONSAFEPATH"] == "1"
        assert str(folder) not in path
    assert not (cluster / "marker").exists()
    assert sorted(p.name for p in folder.iterdir()) == [".deepspeed_env", "deepspeed.py", "json.py", "torch.py"]


def test_several_hosts_need_pdsh(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(hosts: str, *extra: str) -> str:
        (cluster / "hosts").write_text(hosts)
        options = NOTHING | {"extra": list(extra)}
        return submit.job("recipe.yaml", [], hostfile=str(cluster / "hosts"), port=0, **options).missing

    assert missing("one slots=1\ntwo slots=1\n") == ""
    (cluster / "bin" / "pdsh").unlink()
    assert missing("one slots=1\ntwo slots=1\n") == submit.NO_PDSH
    assert missing("one slots=1\n") == ""
    assert missing("one slots=1\ntwo slots=1\n", "--launcher", "openmpi") == ""


def test_a_variable_that_shells_would_change_is_refused(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/tmp/$(id)")
    with pytest.raises(ValueError, match=r"PYTHONPATH=.*through their shells"):
        submit.job("recipe.yaml", [], hostfile=str(cluster / "hosts"), port=0, **NOTHING)


def test_the_users_own_file_of_variables_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("A=1\n")
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    assert submit.environment()["DS_ENV_FILE"] == os.devnull
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("A=1\n")
    assert submit.environment()["DS_ENV_FILE"] == str(tmp_path / "home" / ".deepspeed_env")
    monkeypatch.setenv("DS_ENV_FILE", "mine")
    assert submit.environment()["DS_ENV_FILE"] == str(tmp_path / "mine")


def test_a_rank_works_in_the_folder_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.getcwd()
    try:
        os.chdir(tmp_path)
        word = submit.packed(["nowhere.yaml", "--verbose"])
        os.chdir(before)
        assert main([word]) == 3
        assert Path.cwd() == tmp_path
    finally:
        os.chdir(before)
    assert "nowhere.yaml: neither a file" in capsys.readouterr().err


def test_ranks_of_one_machine_listen_on_loopback_only() -> None:
    from tests.processes import run

    text = run(Path(__file__).with_name("listening_rank.py"), [], 2)
    assert text.count("listens at ['127.0.0.1']") == 2
    assert text.count("gathered [{'rank': 0, 'text': ''}, {'rank': 1, 'text': 'é'}]") == 2


def test_no_rank_unpickles_what_comes_over_the_network() -> None:
    files = [p for room in ("launch", "pretrain") for p in (REPOSITORY / room).rglob("*.py")]
    users = [p.name for p in files if "gather_object" in p.read_text() or "broadcast_object" in p.read_text()]
    assert users == []


@pytest.mark.parametrize(
    "visible, processes, places",
    [(None, 2, [0, 1]), ("4,5,6", 2, ["4", "5"]), ("MIG-a", 1, ["MIG-a"]), ("3", 2, [0, 1])],
)
def test_the_launcher_of_one_machine_gets_the_visible_devices(
    visible: str | None, processes: int, places: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    world, *others = submit.local_launcher(processes, port=29999)
    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"localhost": places}
    assert "--master_port=29999" in others
