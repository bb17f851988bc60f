"""A run over several "hosts" of one machine: network namespaces with a launcher each, which know each other by address only.

    with two_hosts() as hosts, store_on(hosts[0], folder) as url:
        run = Cluster(hosts, recipe, ["run.dir=…"])        # the real `deepspeed` launcher, once on each host
        run.until(step=10, metrics=run_dir / "metrics.jsonl")
        run.kill(hosts[1])                                 # SIGKILL to every process of that host at once
        statuses = run.wait(60)
        assert all(host_pids(host) == [] for host in hosts)

The file system is shared, as on a cluster; interfaces, ports and loopback are not. Needs root (`two_hosts` skips, loudly).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.processes import environment
from tests.servers import Host
from tiphys.launch.submit import TRAIN, launcher

TESTS = Path(__file__).parent


def host_pids(host: Host) -> list[int]:
    """The processes of a host."""
    told = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True)
    return [int(pid) for pid in told.stdout.split()]


@contextlib.contextmanager
def store_on(host: Host, folder: str | Path) -> Iterator[str]:
    """The URL of a folder that is served by a process on a host, to itself and its neighbours."""
    command = host.command(sys.executable, str(TESTS / "folder_server.py"), str(folder), host.address)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


class Cluster:
    """`deepspeed --hostfile … launch/train.py RECIPE OVERRIDES`, with one process a host."""

    def __init__(
        self, hosts: Sequence[Host], recipe: Path, overrides: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        self.hosts, self.before = list(hosts), {host.name: set(host_pids(host)) for host in hosts}
        hostfile = recipe.with_name("hostfile")
        hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        self.outputs, self.launchers = [], []
        for rank, host in enumerate(hosts):
            more = ["--no_ssh", "--node_rank", str(rank), "--master_addr", hosts[0].address]
            command = host.command(
                *launcher(0, port=29555, hostfile=str(hostfile), extra=more), *TRAIN, str(recipe), *overrides
            )
            settings = {**environment(), "GLOO_SOCKET_IFNAME": host.interface, **(env or {})}
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the test)
            self.outputs.append(output)
            self.launchers.append(
                subprocess.Popen(command, env=settings, stdout=output, stderr=subprocess.STDOUT, cwd=recipe.parent)
            )

    def until(self, step: int, metrics: Path, seconds: float = 120.0) -> None:
        """Wait until the run has done a step."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert all(p.poll() is None for p in self.launchers), self.text()
            if metrics.is_file() and any(s >= step for s in losses(metrics)):
                return
            time.sleep(0.05)
        raise AssertionError(f"no step {step} within {seconds} s\n{self.text()}")

    def kill(self, host: Host) -> None:
        """The host is gone: none of its processes of this run has time for a last word."""
        for _ in range(3):  # a process may start another one meanwhile
            for pid in self.left(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def left(self, host: Host) -> list[int]:
        """The run's processes on a host."""
        return [pid for pid in host_pids(host) if pid not in self.before[host.name]]

    def wait(self, seconds: float = 180.0) -> list[int]:
        """Exit statuses of the launchers; AssertionError, after killing everything, where they do not end in time."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.launchers]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.text()}") from None
        finally:
            for process in self.launchers:
                if process.poll() is None:
                    for host in self.hosts:
                        self.kill(host)
                    process.wait()

    def text(self) -> str:
        parts = []
        for host, output in zip(self.hosts, self.outputs):
            output.seek(0)
            parts.append(f"--- {host.name}\n{output.read()[-6000:]}")
        return "\n".join(parts)


def losses(metrics: Path) -> dict[int, float]:
    """Step -> loss, of a run's metrics; a last line that is still being written is left out."""
    out = {}
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if "kind" not in found:
                out[found["step"]] = found["loss"]
    return out
