"""A name that does not resolve for a while costs only time; one that never resolves again is an error that names the object."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dataio.loading_fixtures import dataset, digest_batch
from tests.dataio.test_loader import NEEDS, make_plan, rows_of
from tests.processes import REPOSITORY
from tiphys.dataio.loader import CacheBudget, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home

STEPS = 6
# Runs on a host of its own. The server keeps no connection open, so that every request looks its name up in /etc/hosts.
SCRIPT = """
    import json, sys, threading, time
    sys.path[:0] = {paths!r}
    from tests.folder_server import FolderServer
    from tests.dataio.test_loader import *
    from tiphys.dataio.index import EpisodeIndex

    KNOWN = "127.0.0.1 localhost store.example\\n"

    def know(names):
        with open("/etc/hosts", "w") as file:
            file.write(names)

    def load(index, back):
        rows, retries = {{}}, 0
        settings = LoaderSettings(
            cache=CacheBudget(memory=256 << 10), prefetch=1 << 12, attempts=8 if back else 3
        )
        with TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=settings, stop={steps}) as loader:
            for batch in loader:
                rows |= rows_of([batch])
                retries += batch.counters["retries"]
                if batch.step == 0:
                    know("")
                    if back:
                        threading.Timer(1.0, know, (KNOWN,)).start()
                batch.release()
        return rows, retries

    know(KNOWN)
    with FolderServer({folder!r}, keep=False) as server:
        index = EpisodeIndex.open(server.url.replace("127.0.0.1", "store.example") + "/set")
        rows, retries = load(index, back=True)
        time.sleep(1.1)
        try:
            load(index, back=False)
            error = ""
        except OSError as failure:
            error = f"{{type(failure).__name__}}: {{failure}}"
    print(json.dumps({{"rows": [[*key, digest.hex()] for key, digest in rows.items()], "retries": retries, "error": error}}))
"""


@contextlib.contextmanager
def lonely_host() -> Iterator[str]:
    """A network namespace with a loopback, without name servers, and with an /etc/hosts of its own."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a host with its own names needs root and iproute2: this test did NOT run")
    name = f"tiphysdns{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"ip netns add: {made.stderr.strip()}: this test did NOT run")
    etc = Path("/etc/netns") / name
    try:
        etc.mkdir(parents=True)
        (etc / "hosts").write_text("")
        (etc / "resolv.conf").write_text("")
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(etc)


@pytest.mark.root
def test_a_name_that_does_not_resolve_for_a_while_and_one_that_never_does(tmp_path: Path) -> None:
    index: Any = dataset(str(tmp_path / "set"))
    settings = LoaderSettings(cache=CacheBudget(memory=4 << 20))
    with TrajectoryLoader(make_plan(index), Home(0, 1), digest_batch, NEEDS, settings=settings, stop=STEPS) as loader:
        expected: dict[tuple[int, int], bytes] = {}
        for batch in loader:
            expected |= rows_of([batch])
            batch.release()
    paths = [str(REPOSITORY)]
    code = textwrap.dedent(SCRIPT).format(paths=paths, folder=str(tmp_path), steps=STEPS)
    with lonely_host() as host:
        command = ["ip", "netns", "exec", host, sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {(step, row): bytes.fromhex(digest) for step, row, digest in found["rows"]} == expected
    assert found["retries"] > 0
    assert found["error"].startswith("StoreError: http://store.example:"), found["error"]
    assert "/set/shards/" in found["error"]
    assert "could not be read in 3 tries" in found["error"]
