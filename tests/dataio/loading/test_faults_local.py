"""Faults of the machine that a loader runs on: its disks, its limits, its signals, other code in the trainer."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.loading.test_faults import load
from tests.dataio.loading_fixtures import CONTROL, copied, dataset, digest_batch
from tests.dataio.test_cache import Stream
from tests.dataio.test_loader import NEEDS, make_plan, rows_of
from tests.folder_server import FolderServer
from tests.processes import REPOSITORY
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.rows import broken_row, row_dtype
from tiphys.dataio.loader import CacheBudget, LoadedBatch, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.dataio.storage import Store, StoreError

Rows = dict[tuple[int, int], bytes]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dataset(str(tmp_path_factory.mktemp("data") / "set"))


@pytest.fixture(scope="module")
def reference(index: Any) -> Rows:
    return rows_of(load(index))


# The cache's disk


@pytest.mark.parametrize("where", ["file", "file/below", "link"])
def test_a_folder_that_cannot_hold_the_cache_is_named_with_its_setting(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(DataError, match=rf"/{where} (is not used as a cache|cannot be used: .*data\.cache\.dir)"):
        Stream().cache(0.05, 0.3, tmp_path / where)


def test_a_folder_is_waited_for_if_its_process_was_just_killed(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        Stream().cache(0.05, 0.3, tmp_path).close()


@pytest.mark.parametrize("then", ["nothing", "file"])
def test_a_cache_folder_that_is_deleted_while_it_is_in_use_costs_nothing(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiphys.dataio.caching.tiers._JOURNAL", 1000)  # the journal is rewritten all the time
    stream, folder = Stream(units=500, per_block=20), tmp_path / "cache"
    cache = stream.cache(0.2, 0.3, folder)
    for step in range(200):
        if step == 50:
            shutil.rmtree(folder)
            if then == "file":
                folder.write_text("")
        stream.step(cache)
    assert cache.counters["disk_bytes"] > 0
    cache.close()
    assert (list(tmp_path.iterdir()) == []) == (then == "nothing")


def test_a_disk_that_is_full_when_the_journal_is_rewritten_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tiphys.dataio.caching.tiers._JOURNAL", 1000)
    stream = Stream(units=500, per_block=20)
    cache = stream.cache(0.2, 0.3, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("tiphys.dataio.caching.tiers.os.replace", full)
        for _ in range(200):
            stream.step(cache)
    live = int(cache.kept.disk.slabs.live.sum())
    cache.close()
    assert not (tmp_path / "journal.new").exists()
    late = stream.cache(0.2, 0.3, tmp_path, start=200)
    assert late.holds(np.arange(stream.units)).sum() == live
    stream.step(late)
    late.close()


def test_half_a_record_is_removed_from_the_journal(tmp_path: Path) -> None:
    stream = Stream(units=500, per_block=20)
    cache = stream.cache(0.2, 0.3, tmp_path)
    for _ in range(20):
        stream.step(cache)
    disk, before = cache.kept.disk, os.path.getsize(tmp_path / "journal")
    disk._pending = [(0, 1, 0)] * 10
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 30, limits[1]))
    try:
        disk.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.path.getsize(tmp_path / "journal") == before
    disk._pending = [(0, 1, 0)]
    disk.flush()
    cache.close()
    assert os.path.getsize(tmp_path / "journal") == before + 24


def test_a_failing_disk_under_the_data_is_named(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("tiphys.dataio.stores.files._pread", fail)
    with pytest.raises(StoreError, match=r"set/shards/000000\.tar: could not be read: Input/output error"):
        Store(index.url).read_ranges("shards/000000.tar", [0], [10])


# The data


@pytest.mark.parametrize("change", ["swapped", "empty", "gone", pytest.param("a folder", marks=pytest.mark.long)])
def test_wrong_shards_stop_the_run_and_are_named(change: str, tmp_path: Path) -> None:
    index = dataset(str(tmp_path / "set"))
    first, second = (tmp_path / "set" / s.name for s in index.shards[:2])
    assert first.stat().st_size != second.stat().st_size
    if change == "swapped":
        first.rename(tmp_path / "x")
        second.rename(first)
        (tmp_path / "x").rename(second)
    elif change == "empty":
        first.write_bytes(b"")
    elif change == "gone":
        shutil.rmtree(tmp_path / "set" / "shards")
    else:
        first.unlink()
        first.mkdir()
    with pytest.raises(
        (DataError, StoreError), match=r"set/shards/\d{6}\.tar: (has|there is no such|could not be read)"
    ):
        load(index)


def test_valid_rows_of_other_steps_are_not_taken_for_those_that_were_asked_for(tmp_path: Path) -> None:
    """Every row is complete and has a valid checksum, but the rows are rotated by one place."""
    index = dataset(str(tmp_path / "set"), tasks=(CONTROL,))
    plan = make_plan_of_one(index)
    expected = rows_of(load_plan(plan))
    bad = int(plan.windows(1).episode[0])
    where, row_bytes = index.ranges(bad, 0, int(index.rows[bad]), ())[0], row_dtype(CONTROL).itemsize
    shard = tmp_path / "set" / index.shard_name(where.shard)
    data = bytearray(shard.read_bytes())
    rows = data[where.offset : where.offset + where.size]
    data[where.offset : where.offset + where.size] = rows[-row_bytes:] + rows[:-row_bytes]
    assert broken_row(memoryview(data)[where.offset : where.offset + where.size], row_bytes) == -1
    shard.write_bytes(data)
    batches = load_plan(plan)
    assert {event["id"] for batch in batches for event in batch.quarantined} == {index.id(bad)}
    assert rows_of(batches).keys() == expected.keys()


def make_plan_of_one(index: Any) -> Any:
    from tests.dataio.test_loader import lengths
    from tiphys.dataio.sampling import PlanEntry, SamplingPlan

    entry = PlanEntry(index=index, lengths=lengths(index, 10), weight=1.0, name="control", tasks=[0], priority=None)
    return SamplingPlan([entry], rows=12, budget=64, seed=5)


def load_plan(plan: Any) -> list[LoadedBatch]:
    settings = LoaderSettings(cache=CacheBudget(memory=1 << 20))
    with TrajectoryLoader(plan, Home(0, 1), digest_batch, NEEDS[:1], settings=settings, stop=3) as loader:
        return [copied(batch) for batch in loader]


# The process

CHILD = """
import sys
sys.path[:0] = {paths!r}
from tests.dataio.loading.test_faults_local import *
from tiphys.dataio.index import EpisodeIndex
rows = rows_of(load(EpisodeIndex.open({url!r}), timeout=10.0))
np.save({out!r}, np.array([[*key, *digest] for key, digest in sorted(rows.items())]))
"""


def run_in_shell(how: str, url: str, folder: Path) -> Rows:
    """The rows that another process loads. `how`: how a shell starts it; `python` in it stands for the command."""
    paths = [str(REPOSITORY)]
    script, out = folder / "child.py", folder / "rows.npy"
    script.write_text(textwrap.dedent(CHILD).format(paths=paths, url=url, out=str(out)))
    command = how.replace("python", f"{sys.executable} {script}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return {(int(r[0]), int(r[1])): bytes(r[2:].astype(np.uint8)) for r in np.load(out)}


@pytest.mark.parametrize("how", ["python <&- >&- 2>&-", pytest.param("python >&- 2>&-", marks=pytest.mark.long)])
def test_a_trainer_with_closed_standard_streams_gets_the_same_windows(
    how: str, index: Any, reference: Rows, tmp_path: Path
) -> None:
    assert run_in_shell(how, index.url, tmp_path) == reference


def test_no_socket_takes_the_place_of_a_closed_standard_stream() -> None:
    """Otherwise printed or logged text would go through the connection between trainer and loader process."""
    code = (
        "import os, socket, tiphys.dataio.loader; tiphys.dataio.loader._fill_standard_streams(); a, b = socket.socketpair();"
        "os._exit(min(a.fileno(), b.fileno()) <= 2 or not all(map(os.get_inheritable, (0, 1, 2))))"
    )
    command = [sys.executable, "-c", code]
    for closed in ("<&- >&- 2>&-", ">&- 2>&-", "2>&-"):
        shell = ["bash", "-c", f'exec "$@" {closed}', "sh", *command]
        assert subprocess.run(shell, cwd=REPOSITORY, timeout=60, check=False).returncode == 0


@pytest.mark.long
def test_a_process_that_may_open_few_files_makes_fewer_requests_at_once(
    index: Any, reference: Rows, tmp_path: Path
) -> None:
    with FolderServer(Path(index.url).parent) as server:
        assert run_in_shell("ulimit -n 64; python", f"{server.url}/set", tmp_path).keys() == reference.keys()


def test_a_child_of_the_trainer_that_ends_leaves_the_loader_alone(index: Any, reference: Rows) -> None:
    """Other code may fork workers, which inherit the loader and close it."""
    rows: Rows = {}
    settings = LoaderSettings(cache=CacheBudget(memory=1 << 20), prefetch=1)
    with TrajectoryLoader(make_plan(index), Home(0, 1), digest_batch, NEEDS, settings=settings, stop=6) as loader:
        for batch in loader:
            rows |= rows_of([batch])
            batch.release()
            if batch.step == 0:
                child = os.fork()
                if child == 0:
                    loader.close()
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
    assert rows == reference


@pytest.mark.long
def test_a_loader_that_is_suspended_for_a_while_continues(index: Any, reference: Rows) -> None:
    """Transfers are in flight, and their timeouts run meanwhile."""
    rows: Rows = {}
    settings = LoaderSettings(cache=CacheBudget(memory=256 << 10), prefetch=1, timeout=1.0)
    with FolderServer(Path(index.url).parent) as server:
        from tiphys.dataio.index import EpisodeIndex

        far = EpisodeIndex.open(f"{server.url}/set")
        with TrajectoryLoader(make_plan(far), Home(0, 1), digest_batch, NEEDS, settings=settings, stop=6) as loader:
            for batch in loader:
                rows |= rows_of([batch])
                batch.release()
                if batch.step == 0:
                    number = loader.pid
                    assert number is not None
                    os.kill(number, signal.SIGSTOP)
                    threading.Timer(20.0, os.kill, (number, signal.SIGCONT)).start()
                    time.sleep(0.1)
    assert rows.keys() == reference.keys()
