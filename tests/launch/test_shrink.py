"""A host that fails twice without a newer checkpoint is left out, if the run fits on the others. Its batches stay the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch.small_recipe import small_recipe
from tests.processes import environment
from tiphys.launch import devices
from tiphys.launch import supervise as module
from tiphys.launch.hosts import ranks_of_hosts
from tiphys.launch.layout_command import NothingFits
from tiphys.launch.shrink import Blame, fewer_ranks, host_of
from tiphys.launch.statuses import Status
from tiphys.launch.supervise import Job, Node, Settings, supervise
from tiphys.pretrain.distributed.deepspeed_config import derive
from tiphys.pretrain.parallel import Grid
from tiphys.recipes.load import load_recipe

FAKE = Path(__file__).with_name("fake_launch.py")
# Stands for the command `deepspeed`: it writes down its options, and passes the ranks' words on.
DEEPSPEED = """#!/bin/bash
echo "$@" >> {shown}
while [[ $1 == --* ]]; do [[ $1 == --hostfile ]] && shift; shift; done
exec {python} {fake} "$@"
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder. Nothing is checked, pauses are short, and every layout fits."""
    folder = tmp_path / "run"
    monkeypatch.setattr(Node, "check", lambda self, stops: Settings(str(folder), 0.2, 5, shrink=True))
    monkeypatch.setattr(module, "pause_after", lambda failures: 0.01)
    monkeypatch.setattr(Node, "fit", lambda self, world, each, *_: {"overrides": ["a=1"], "said": f"{world}, {each}"})
    return folder


def job(folder: Path, plan: str, hosts: dict[str, int]) -> Job:
    """`fake_launch.py` on hosts of a hostfile; rank 0 always says that it lost rank 1."""
    program = folder / "deepspeed"
    program.write_text(DEEPSPEED.format(shown=folder / "shown", python=sys.executable, fake=FAKE))
    program.chmod(0o755)
    return Job({}, None, [str(program), "--hostfile", "hosts"], [plan], list, "", 2, environment(), hosts)


def shown(folder: Path) -> list[list[str]]:
    """The words of each launch, without those about the launch."""
    return [line.split()[:-1] for line in (folder / "shown").read_text().splitlines()]


def test_a_host_that_failed_twice_is_left_out(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(job(tmp_path, "lost,lost,done", {"a": 1, "b": 1})) == Status.DONE
    hosts = str(run / "launches" / "hosts")
    before = ["--hostfile", "hosts", "lost,lost,done"]
    assert shown(tmp_path) == [before, before, ["--force_multi", "--hostfile", hosts, "lost,lost,done", "a=1"]]
    assert Path(hosts).read_text() == "a slots=1\n"
    assert "tiphys: host b failed 2 times and is left out (restart.shrink): 1, 1\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    "plan, hosts",
    [
        ("lost,saves,done", {"a": 1, "b": 1}),  # the second launch saved a newer checkpoint
        ("lost,lost,done", {"b": 2}),  # there is no other host
        ("nothing,nothing,done", {"a": 1, "b": 1}),  # no rank of any host has left a report
    ],
)
def test_hosts_are_kept_otherwise(plan: str, hosts: dict[str, int], run: Path, tmp_path: Path) -> None:
    assert supervise(job(tmp_path, plan, hosts)) == Status.DONE
    assert all(words[:2] == ["--hostfile", "hosts"] for words in shown(tmp_path))


def test_without_the_key_no_host_is_left_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "check", lambda self, stops: Settings(str(run), 0.2, 5))
    assert supervise(job(tmp_path, "lost,lost,done", {"a": 1, "b": 1})) == Status.DONE
    assert not (run / "launches" / "hosts").exists()


def test_a_host_that_is_needed_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Node, "fit", lambda *_: {"why": "no layout fits"})
    assert supervise(job(tmp_path, "lost,lost,done", {"a": 1, "b": 1})) == Status.DONE
    assert "host b failed 2 times, but the run cannot go on without it: no layout fits" in capfd.readouterr().err
    assert shown(tmp_path)[2] == shown(tmp_path)[0]


def test_hosts_that_deepspeed_chooses_are_refused(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(job(tmp_path, "done", {})) == Status.REFUSED
    assert "restart.shrink: the ranks of each host must be known" in capfd.readouterr().err
    hosts = {"a": 8, "b": 4}
    assert ranks_of_hosts(hosts, 0, []) == hosts
    assert ranks_of_hosts(hosts, 2, ["--ssh_port=22"]) == {"a": 2, "b": 2}
    for option in ("--include=b", "--num_nodes=1", "--master_addr=10.0.0.1", "--no_ssh"):
        assert ranks_of_hosts(hosts, 0, [option]) == {}


def test_failures_of_a_host_count_until_another_one_fails_or_something_is_saved() -> None:
    blame, times = Blame(), []
    for host, progress in [
        ("a", False),
        ("a", False),
        ("b", False),
        ("b", True),
        ("b", False),
        ("", False),
        ("b", False),
    ]:
        blame.add(host, progress=progress)
        times.append(blame.times)
    assert times == [1, 2, 1, 1, 2, 0, 1]


def test_ranks_are_on_hosts_in_the_order_of_the_hostfile() -> None:
    hosts = {"a": 2, "b": 3}
    assert [host_of(ranks, hosts) for ranks in ((0, 1), (2, 4), (1, 2), (), (9,))] == ["a", "b", "", "", ""]


def test_a_real_layout_on_fewer_ranks_has_the_same_batches(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(small_recipe())
    sizes = ["train_batch_size=12", "train_micro_batch_size_per_gpu=2", "gradient_accumulation_steps=2"]
    words = [f"deepspeed.{size}" for size in sizes]
    found = fewer_ranks(str(tmp_path / "small.yaml"), words, world=2, before=3, each=1)
    assert found.overrides == [
        "deepspeed.train_micro_batch_size_per_gpu=2",
        "deepspeed.gradient_accumulation_steps=3",
    ]
    assert found.said == "2 ranks of 3 × 2 rows instead of 3 of 2 × 2, the same 12 rows a step"
    made = derive(load_recipe(tmp_path / "small.yaml", [*words, *found.overrides]), Grid(0, 2, 1, 1))
    assert (made.rows, made.micro_batch * made.accumulation * 2) == (12, 12)


@pytest.mark.long
def test_other_keys_change_only_if_they_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text(small_recipe())
    staged = ["model.layers=3", "parallel.pipeline=3", "deepspeed.zero_optimization.stage=1"]
    other = fewer_ranks(str(tmp_path / "small.yaml"), staged, world=2, before=3, each=1)
    made = derive(load_recipe(tmp_path / "small.yaml", [*staged, *other.overrides]), Grid(0, 2, 1, 1))
    assert (made.rows, made.micro_batch * made.accumulation * 2) == (4, 4)
    assert "parallel.pipeline=3" not in other.overrides

    monkeypatch.setattr(devices, "device_memory", lambda processes: 1 << 20)
    with pytest.raises(NothingFits, match=r"no layout on 2 ranks fits 0\.0 GiB"):
        fewer_ranks(str(tmp_path / "small.yaml"), [], world=2, before=3, each=1)
