"""A Slurm job passes signals on, and is queued again exactly after the statuses 70, 75 and 143. `sbatch` and `scontrol` are
fakes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.small_recipe import small_recipe
from tiphys.launch import slurm
from tiphys.launch.cli import main
from tiphys.launch.statuses import Status


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fakes on PATH, which write down how they are called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, does in (
        ("sbatch", "echo Submitted batch job 7"),
        ("scontrol", 'test "$1" = show && printf "a\\nb\\n"; true'),
    ):
        (tools / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.txt\n{does}\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "x[1-2]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(small_recipe())
    return tmp_path


def job(cluster: Path, program: str, monkeypatch: pytest.MonkeyPatch, **options: int) -> subprocess.Popen[bytes]:
    """Start the script of a job in which `program` takes the place of `tiphys train`."""
    (cluster / "train").write_text(f'#!/bin/bash\necho "$@" > {cluster}/train.txt\n{program}\n')
    (cluster / "train").chmod(0o755)
    monkeypatch.setattr(slurm.sys, "executable", str(cluster / "train"))
    text = slurm.script("a run", cluster / "run", ["my recipe.yaml", "name=it's"], **options)  # type: ignore[arg-type]
    (cluster / "job.sh").write_text(text)
    (cluster / "run" / "slurm").mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(["bash", str(cluster / "job.sh")])


def queued_again(cluster: Path) -> bool:
    asked = cluster / "scontrol.txt"
    return "requeue 7\n" in (asked.read_text() if asked.exists() else "")


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("status, again", [(0, False), (3, False), (5, False), (70, True), (75, True), (143, True)])
def test_it_is_queued_again_if_the_run_can_go_on(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, status: int, again: bool
) -> None:
    assert job(cluster, f"exit {status}", monkeypatch, nodes=nodes).wait(60) == status
    assert queued_again(cluster) == again


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("status", [0, 143])
def test_a_signal_reaches_the_run_and_its_status_counts(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, status: int
) -> None:
    """A run that was done anyway when the signal came saves and ends with 0."""
    saves = f"trap 'sleep .3; exit {status}' TERM; touch {cluster}/up; while :; do sleep .05; done"
    started = job(cluster, saves, monkeypatch, nodes=nodes)
    while not (cluster / "up").exists():
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == status
    assert queued_again(cluster) == (status == 143)


def test_without_a_number_a_node_has_a_rank_for_each_gpu(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, slots in (("8", 8), ("", 2)):
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
        assert job(cluster, "exit 0", monkeypatch, nodes=2).wait(60) == 0
        assert (cluster / "run" / "slurm" / "hosts-7").read_text() == f"a slots={slots}\nb slots={slots}\n"


def test_words_arrive_unchanged_and_several_nodes_are_a_hostfile(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job(cluster, "exit 0", monkeypatch, nodes=2, processes=4).wait(60) == 0
    hosts = cluster / "run" / "slurm" / "hosts-7"
    assert hosts.read_text() == "a slots=4\nb slots=4\n"
    assert subprocess.run(["bash", "-n", str(cluster / "job.sh")], check=False).returncode == 0
    options = [line for line in (cluster / "job.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=2" in options
    assert "#SBATCH --ntasks-per-node=1" in options
    assert (cluster / "train.txt").read_text() == f"-P -m tiphys train my recipe.yaml name=it's --hostfile {hosts}\n"


@pytest.mark.parametrize("command", [["submit"], ["train", "--on", "slurm"]])
def test_the_command_writes_the_script_and_submits_it(
    cluster: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command, "small.yaml", "train.steps=3", "--slurm", "--partition=gpu --time=1:00:00"]
    assert main([*words, "--dry-run"]) == Status.DONE
    assert not (cluster / "sbatch.txt").exists()
    assert main(words) == Status.DONE
    file = cluster / "run" / "slurm" / "job.sh"
    assert (cluster / "sbatch.txt").read_text() == f"{file}\n"
    assert "Submitted batch job 7" in capsys.readouterr().out
    text = file.read_text()
    assert "#SBATCH --partition=gpu\n#SBATCH --time=1:00:00\n" in text
    assert "#SBATCH --requeue\n" in text
    assert "train small.yaml train.steps=3 --processes" in text
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0


def test_bad_input_is_refused_before_anything_is_written(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "small.yaml", "--slurm", "partition=gpu"]) == Status.REFUSED
    assert "'partition=gpu' is not an option of sbatch" in capsys.readouterr().err
    assert main(["submit", "small.yaml", "modle.layers=3"]) == Status.REFUSED
    assert not (cluster / "run").exists()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert main(["submit", "small.yaml"]) == Status.REFUSED
    assert "there is no command sbatch" in capsys.readouterr().err
