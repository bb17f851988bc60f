"""`tiphys train --hostfile` on two hosts (network namespaces). A host that is lost twice is left out (`restart.shrink`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.cluster import host_pids, losses
from tests.launch.small_recipe import small_recipe
from tests.processes import environment
from tests.servers import Host, two_hosts
from tiphys.launch.launches import Launch
from tiphys.launch.statuses import Status
from tiphys.pretrain.phases import Beat

pytestmark = [pytest.mark.root, pytest.mark.long]
STEPS, LONG = 300, 400.0
# As pdsh and ssh do it: a shell on each host, in a session of its own, which the command's end does not reach.
ON_HOST = """#!/bin/bash
on() {{ case $1 in {cases} esac; }}
"""
PDSH = """hosts=$5; shift 5
n=0
for host in ${hosts//,/ }; do
    on $host "${*//%n/$n}" & started[n]=$!
    n=$((n + 1))
done
status=0
for one in ${started[@]}; do wait $one || status=$?; done
exit $status
"""
SSH = """while [[ $1 == -* ]]; do shift 2; done
host=$1; shift
on $host "$*"
"""


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with two_hosts("lost") as hosts:
        yield hosts


def programs(folder: Path, hosts: Sequence[Host]) -> Path:
    """`pdsh` and `ssh` that reach the namespaces."""
    cases = " ".join(
        f'{host.address}) exec setsid -w ip netns exec {host.name} env GLOO_SOCKET_IFNAME={host.interface} bash -c "$2" ;;'
        for host in hosts
    )
    folder.mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (folder / name).write_text(ON_HOST.format(cases=cases) + text)
        (folder / name).chmod(0o755)
    return folder


def kill(host: Host) -> None:
    """Kill everything on a host, again and again for a moment: a process may start another one meanwhile."""
    for _ in range(3):
        for pid in host_pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def test_a_host_that_is_lost_twice_is_left_out_and_the_losses_stay(hosts: list[Host], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    (tmp_path / "small.yaml").write_text(small_recipe(steps=STEPS))
    run, path = tmp_path / "run", programs(tmp_path / "bin", hosts)
    command = [sys.executable, "-m", "tiphys", "train", "small.yaml", "--hostfile", "hosts", "restart.shrink=true"]
    env = environment()
    env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    said = tmp_path / "said.txt"
    with said.open("w") as out:
        process = subprocess.Popen(
            [*command, "checkpoint.every=0", "checkpoint.minutes=0"],
            cwd=tmp_path,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        for number in (1, 2):
            until_step(5, Launch(run, number), process, said)
            on_two = losses(run / "metrics.jsonl")
            kill(hosts[1])
        assert process.wait(LONG) == Status.DONE, said.read_text()
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        for host in hosts:
            kill(host)
    text = said.read_text()
    assert "restart 2: rank 1 " in text, text
    assert (
        f"host {hosts[1].address} failed 2 times and is left out (restart.shrink): 1 rank of 2 × 2 rows instead of 2 of 1 × 2, "
        "the same 4 rows a step"
    ) in text
    assert "1 process = 1 pipeline × 1 data" in text
    on_one = losses(run / "metrics.jsonl")
    assert sorted(on_one) == list(range(1, STEPS + 1))
    assert len(on_two) >= 3
    assert {step: on_one[step] for step in on_two} == pytest.approx(on_two, rel=1e-4)


def until_step(step: int, launch: Launch, process: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until both ranks of a launch are at a step."""
    end = time.monotonic() + LONG
    while not all((beat := Beat.read(launch.beat_file(r))) is not None and beat.step >= step for r in (0, 1)):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.05)
