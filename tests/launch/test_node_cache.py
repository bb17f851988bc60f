"""After the number of processes has changed, the data cached on disk is still used: the same windows, less from the store."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster import losses
from tests.dataio.loading_fixtures import dataset, digest_batch
from tests.dataio.test_loader import NEEDS, make_plan, rows_of
from tests.folder_server import FolderServer
from tests.processes import environment
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.launch.node_cache import NodeCache, own_address, survey
from tiphys.launch.submit import TRAIN, launcher

STEPS = 12  # of a launch
BUCKETS, MEMORY, DISK = 8, 320 << 10, 8 << 20


@dataclass
class Meeting:
    """Exchanges values between the ranks of a launch, which are threads here."""

    ranks: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.ranks, timeout=60)


@dataclass
class World:
    """The part of ParallelDims that NodeCache uses."""

    rank: int
    local: int
    meeting: Meeting
    is_first_stage: bool = True

    @property
    def data(self) -> int:
        return self.meeting.ranks

    @property
    def home(self) -> Home:
        return Home(self.rank, self.data)

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        out = [self.meeting.values[rank] for rank in range(self.data)]
        self.meeting.barrier.wait()
        return out


@dataclass
class Totals:
    rows: dict[tuple[int, int], bytes] = field(default_factory=dict)
    store: float = 0.0
    peer: float = 0.0
    disk: float = 0.0
    served: int = 0  # loaders that listened


def launch(
    index: Any, folder: Path, nodes: Sequence[int], start: int, stop: int, peers: bool = True, disk: int = DISK
) -> Totals:
    """One launch of steps [start, stop). `nodes`: how many loaders run on each node. Each node has its own cache folder."""
    meeting, totals, lock = Meeting(sum(nodes)), Totals(), threading.Lock()
    places = [(node, local) for node, count in enumerate(nodes) for local in range(count)]

    def one(rank: int) -> None:
        node, local = places[rank]
        world: Any = World(rank, local, meeting)
        cache = NodeCache(world, str(folder / str(node)), MEMORY, disk, [index.fingerprint])
        with TrajectoryLoader(
            make_plan(index, buckets=BUCKETS), world.home, digest_batch, NEEDS,
            settings=LoaderSettings(cache=cache.budget, unit_rows=2), peers=cache.peers if peers else None,
            start=start, stop=stop,
        ) as loader:  # fmt: skip
            totals.served += loader.peers is not None
            if not peers:
                cache.peers = None
            cache.on_start(SimpleNamespace(loader=loader))  # type: ignore[arg-type]
            for batch in loader:
                with lock:
                    totals.rows |= rows_of([batch])
                    totals.store += batch.counters["bytes_store"]
                    totals.peer += batch.counters["bytes_peer"]
                    totals.disk += batch.counters["bytes_disk"]
                batch.release()

    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(one, range(len(places))))
    return totals


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A dataset behind a slow server: peers get as much time as the store takes."""
    folder = tmp_path_factory.mktemp("data")
    dataset(str(folder / "set"), episodes=120)
    with FolderServer(folder) as server:
        index = EpisodeIndex.open(f"{server.url}/set")
        server.delay = lambda path: 0.05
        yield index


@pytest.fixture(scope="module")
def reference(index: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], bytes]:
    return launch(index, tmp_path_factory.mktemp("none"), [1], 0, 3 * STEPS, disk=0).rows


def part(rows: dict[tuple[int, int], bytes], start: int, stop: int) -> dict[tuple[int, int], bytes]:
    return {key: value for key, value in rows.items() if start <= key[0] < stop}


# Loaders of each node, for each launch; for each launch after the first, whether folders have moved to other homes
CHANGES = {
    "two to one to two on a node": (([2], [1], [2]), (True, True)),
    "four to three on a node": (([4], [3], [3]), (True, False)),
    "three to four on a node": (([3], [4], [4]), (True, False)),
    "two nodes to one with as many loaders": (([1, 1], [2], [2]), (False, False)),
    "one node to two": (([2], [2, 1], [1, 1]), (True, True)),
}


@pytest.mark.parametrize(
    "name", [n if i == 0 else pytest.param(n, marks=pytest.mark.long) for i, n in enumerate(CHANGES)]
)
def test_data_that_earlier_launches_cached_is_found(
    name: str, index: Any, tmp_path: Path, reference: dict[tuple[int, int], bytes]
) -> None:
    (first, *others), moved = CHANGES[name]
    folder, copy = tmp_path / "with", tmp_path / "without"
    before = launch(index, folder, first, 0, STEPS)
    assert (before.served, before.peer) == (0, 0)
    assert before.rows == part(reference, 0, STEPS)
    for number, layout in enumerate(others):
        start = STEPS * (number + 1)
        shutil.copytree(folder, copy)
        found = launch(index, folder, layout, start, start + STEPS)
        alone = launch(index, copy, layout, start, start + STEPS, peers=False)
        shutil.rmtree(copy)
        assert found.rows == alone.rows == part(reference, start, start + STEPS)
        assert (found.served, alone.served) == (sum(layout) if moved[number] else 0, 0)
        if moved[number]:
            assert found.peer > 0.02 * alone.store
            assert found.store < alone.store - 0.5 * found.peer
        for node in folder.iterdir():
            assert sum(p.stat().st_blocks * 512 for p in node.rglob("*") if p.is_file()) <= DISK
            assert len(list(node.glob("loader-*"))) <= max(first[0], *layout)


def old_folder(folder: Path, number: int, process: int, processes: int, size: int = 4096, data: str = "a") -> Path:
    place = folder / f"loader-{number}"
    place.mkdir(parents=True)
    (place / "items").write_bytes(bytes(size))
    (place / "home.json").write_text(json.dumps({"process": process, "processes": processes, "datasets": [data]}))
    return place


def test_folders_that_are_of_no_use_are_removed_and_the_others_found(tmp_path: Path) -> None:
    old_folder(tmp_path, 0, 2, 4)
    old_folder(tmp_path, 1, 3, 4, data="other")
    (old_folder(tmp_path, 2, 0, 1) / "home.json").write_text('{"process": 7, "processes": 4, "datasets": ["a"]}')
    served, large, strange = (
        old_folder(tmp_path, 3, 1, 4),
        old_folder(tmp_path, 4, 1, 4, size=1 << 20),
        tmp_path / "loader-x",
    )
    strange.mkdir()
    found = survey(tmp_path, 2, 1 << 20, ["a"])
    assert [(k.number, k.home) for k in found] == [(0, Home(2, 4)), (3, Home(1, 4))]
    assert {p.name for p in tmp_path.iterdir()} == {"loader-0", "loader-1", "loader-3", "loader-x"}
    assert not large.exists()
    assert [k.number for k in survey(tmp_path, 2, 1 << 20, ["a"])] == [0]  # served during one launch only
    assert not served.exists()


def test_a_folder_in_use_by_another_run_is_left_alone(tmp_path: Path) -> None:
    folder = old_folder(tmp_path, 5, 0, 1, data="other")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert survey(tmp_path, 1, 1 << 20, ["a"]) == []
        assert folder.exists()
    survey(tmp_path, 1, 1 << 20, ["a"])
    assert not folder.exists()


def test_the_interface_is_the_one_that_leads_to_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for master, own in (("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1")):
        monkeypatch.setenv("MASTER_ADDR", master)
        assert own_address() == own


def test_the_secret_is_not_printed(tmp_path: Path) -> None:
    old_folder(tmp_path / "0", 0, 0, 2)
    cache = NodeCache(World(0, 0, Meeting(1)), str(tmp_path / "0"), 1 << 20, 1 << 20, ["a"])  # type: ignore[arg-type]
    assert cache.peers is not None
    assert cache.peers.secret not in repr(cache.peers)


RECIPE = """
name: elastic
data:
  mixture: [{{dataset: {data}, objective: bc}}]
  validation: 0
  buckets: 8
  cache: {{dir: {cache}, memory: {memory}KiB, disk: 512KiB}}
objectives: {{bc: {{context: 32, window: 4}}}}
model: {{layers: 1, hidden: 32, heads: 2, text_vocabulary: 300}}
deepspeed:
  train_batch_size: 12
  zero_optimization: {{stage: 1}}
  optimizer: {{type: AdamW, params: {{lr: 1e-3}}}}
train: {{steps: {steps}}}
checkpoint: {{every: 20}}
run: {{dir: {run}}}
"""


@pytest.mark.long
def test_training_continues_with_fewer_processes_and_finds_the_others_caches(tmp_path: Path) -> None:
    """Through the real launcher: two processes, then one, then two again."""
    pytest.importorskip("gymnasium", reason="needs the envs extra")
    from tiphys.dataio.collect import collect

    collect("CartPole-v1", str(tmp_path / "cartpole"), 60, processes=1, score_episodes=2)

    def train(name: str, steps: int, processes: int) -> None:
        file = tmp_path / "recipe.yaml"
        settings = {"data": f"{url}/cartpole", "run": tmp_path / name, "cache": tmp_path / f"cache-{name}"}
        # As much memory for each loader as before: so little memory bounds the number of units, and so decides their length
        file.write_text(RECIPE.format(**settings, steps=steps, memory=192 * processes))
        command = [*launcher(processes), *TRAIN, str(file)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    with FolderServer(tmp_path) as server:
        url = server.url
        for steps, processes in ((20, 2), (40, 1), (60, 2)):
            train("elastic", steps, processes)
        train("whole", 60, 1)
    lines = [json.loads(line) for line in (tmp_path / "elastic" / "metrics.jsonl").read_text().splitlines()]
    peer = {line["step"]: line["loader"]["bytes_peer"] for line in lines if "kind" not in line}
    assert sum(peer[step] for step in range(1, 21)) == 0
    assert sum(peer[step] for step in range(21, 41)) > 0
    assert sum(peer[step] for step in range(41, 61)) > 0
    found, expected = losses(tmp_path / "elastic" / "metrics.jsonl"), losses(tmp_path / "whole" / "metrics.jsonl")
    assert found == pytest.approx(expected, rel=1e-4)
