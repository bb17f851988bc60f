"""A run on several "hosts" of one machine: network namespaces, each with a launcher. The hosts know only each other's address.

    with two_hosts() as hosts, store_on(hosts[0], folder) as url:
        run = Cluster(hosts, recipe, ["run.dir=…"])        # the real `deepspeed` launcher, one on each host
        run.until(step=10, metrics=run_dir / "metrics.jsonl")
        run.kill(hosts[1])                                 # SIGKILL for all processes of that host
        statuses = run.wait(60)
        assert all(host_pids(host) == [] for host in hosts)

The hosts share the file system, as on a cluster, but not interfaces, ports and loopback. Needs root; without it, `two_hosts`
skips the test with a message.
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
    """All processes of a host."""
    listed = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


@contextlib.contextmanager
def store_on(host: Host, folder: str | Path) -> Iterator[str]:
    """Serve a folder from a process on a host. Gives its URL, which all hosts can reach."""
    command = host.command(sys.executable, str(TESTS / "folder_server.py"), str(folder), host.address)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


class Cluster:
    """`deepspeed --hostfile … launch/train.py RECIPE OVERRIDES`, with one process on each host."""

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
        """Wait until the run has finished a step. Raises AssertionError if a launcher ends, or after `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert all(p.poll() is None for p in self.launchers), self.text()
            if metrics.is_file() and any(s >= step for s in losses(metrics)):
                return
            time.sleep(0.05)
        raise AssertionError(f"no step {step} within {seconds} s\n{self.text()}")

    def kill(self, host: Host) -> None:
        """Kill all processes of this run on a host at once, as if the host had failed."""
        for _ in range(3):  # a process may start another one in between
            for pid in self.left(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def left(self, host: Host) -> list[int]:
        """The processes of the run on a host."""
        return [pid for pid in host_pids(host) if pid not in self.before[host.name]]

    def wait(self, seconds: float = 180.0) -> list[int]:
        """Wait for the launchers' exit statuses. If they do not end in time, kill all processes and raise AssertionError."""
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
    """Step -> loss, from a run's metrics. A last line that is not complete yet is ignored."""
    out = {}
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if "kind" not in found:
                out[found["step"]] = found["loss"]
    return out
