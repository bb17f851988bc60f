"""A run over two hosts has the losses of a run on one. If a host is lost, the run ends and says so, and a resume is exact."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, host_pids, losses, store_on
from tests.processes import environment
from tests.servers import Host, two_hosts
from tiphys.dataio.collect import collect
from tiphys.launch.submit import TRAIN, launcher

pytestmark = [pytest.mark.root, pytest.mark.long]
pytest.importorskip("gymnasium", reason="needs the envs extra")

RECIPE = """
name: hosts
data:
  mixture: [{{dataset: {data}, objective: bc}}]
  validation: 0
  cache: {{memory: 32MiB}}
objectives: {{bc: {{context: 32, window: 4}}}}
model: {{layers: 2, hidden: 32, heads: 2, text_vocabulary: 300, moe: {{experts: 4, experts_per_token: 2}}}}
deepspeed:
  train_batch_size: 9
  zero_optimization: {{stage: 2}}
  optimizer: {{type: AdamW, params: {{lr: 1e-2}}}}
train: {{steps: {steps}}}
checkpoint: {{every: 4}}
run: {{dir: {run}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    collect("CartPole-v1", str(folder / "cartpole"), 20, processes=1, score_episodes=2)
    return folder


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with two_hosts() as hosts:
        yield hosts


def recipe(place: Path, data: str, name: str, steps: int) -> Path:
    file = place / f"{name}.yaml"
    file.write_text(RECIPE.format(data=data, run=place / name, steps=steps))
    return file


def on_one_host(place: Path, data: str, steps: int, processes: int) -> dict[int, float]:
    """Losses of the same run on this machine. One process needs no launcher."""
    file = recipe(place, data, "one", steps)
    command = [sys.executable, "-m", TRAIN[1], str(file)]
    if processes > 1:
        command = [*launcher(processes), *TRAIN, str(file)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(place / "one" / "metrics.jsonl")


def test_two_hosts_have_the_losses_of_one(hosts: list[Host], folder: Path, tmp_path: Path) -> None:
    with store_on(hosts[0], folder) as url:
        run = Cluster(hosts, recipe(tmp_path, f"{url}/cartpole", "two", 6), [])
        assert run.wait() == [0, 0], run.text()
        assert [run.left(host) for host in hosts] == [[], []]
    found = losses(tmp_path / "two" / "metrics.jsonl")
    assert sorted(found) == list(range(1, 7))
    assert found == pytest.approx(on_one_host(tmp_path, str(folder / "cartpole"), 6, 1), rel=1e-5)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_host_ends_the_run_and_a_resume_gives_the_same_losses(
    victim: int, hosts: list[Host], folder: Path, tmp_path: Path
) -> None:
    expected = on_one_host(tmp_path, str(folder / "cartpole"), 30, 2)
    with store_on(hosts[1 - victim], folder) as url:
        file = recipe(tmp_path, f"{url}/cartpole", "two", 30)
        run = Cluster(hosts, file, [])
        run.until(10, tmp_path / "two" / "metrics.jsonl")
        run.kill(hosts[victim])
        began = time.monotonic()
        statuses = run.wait(60)
        print(f"the other host ended after {time.monotonic() - began:.1f} s")
        assert all(statuses), run.text()
        assert "another process of this run is gone" in run.text(), run.text()
        assert [run.left(host) for host in hosts] == [[], []]
        assert sorted(losses(tmp_path / "two" / "metrics.jsonl"))[-1] < 30
        again = Cluster(hosts, file, [])
        assert again.wait() == [0, 0], again.text()
        assert "resumed from" in again.text()
        assert len(host_pids(hosts[1 - victim])) == 1  # the store
    assert losses(tmp_path / "two" / "metrics.jsonl") == expected
