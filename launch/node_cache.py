"""A node's cache among its loaders, from one launch to the next.

Each loader keeps its disk tier in `<data.cache.dir>/loader-<its number among the node's loaders>`, where `home.json` says whose
data lie there: those at home with process p of N. A launch of another world finds these folders with processes that have other
homes. So each loader serves to its peers what lies in its folder, and asks those who have the folders of the processes that a
unit was at home with. Folders beyond the number of loaders (the node has fewer now) are served too, during one launch; their
bytes count against `data.cache.disk`. Where every folder still is with the process that it was with, nothing is served.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_json
from tiphys.dataio.loader import CacheBudget
from tiphys.dataio.peers import PeerSettings
from tiphys.dataio.placement import Home
from tiphys.pretrain.callbacks import Callback

if TYPE_CHECKING:
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.trainer import Trainer

_RECORD = "home.json"
_FOLDER = re.compile(r"loader-(\d{1,6})$")
_INHERITED = 0.75  # of the node's disk budget at most: the rest is for the loaders that there are


@dataclass(frozen=True)
class Kept:
    """What an earlier launch left in a folder of this node: its number, whose data, bytes on disk."""

    number: int
    home: Home
    bytes: int


@dataclass(frozen=True)
class Source:
    """Who serves a folder's data now, and whose they were."""

    rank: int
    home: Home
    inherited: bool  # beyond the folders that the node's loaders go on with


class NodeCache(Callback):
    """This rank's part of its node's cache, and its peers where the world has changed. Made by all ranks at once.

    directory     of the node's disk tiers; empty: memory only
    memory, disk  bytes of the node
    datasets      their fingerprints: what other datasets left is removed

    budget        what this rank's loader may hold
    peers         what it needs to serve others; None where nobody has anything to serve
    """

    def __init__(self, world: ParallelDims, directory: str, memory: int, disk: int, datasets: Sequence[str]) -> None:
        self.world, self.datasets = world, list(datasets)
        node = world.rank - world.local  # the first rank of this machine
        places = world.gather((node, world.is_first_stage))
        ranks_of = {n: [r for r, (where, loads) in enumerate(places) if where == n and loads] for n, _ in places}
        mine = ranks_of[node]
        loaders, number = max(1, len(mine)), mine.index(world.rank) if world.is_first_stage else 0
        disk = disk if directory else 0
        leads = world.is_first_stage and number == 0
        kept = survey(Path(directory), loaders, disk, self.datasets) if leads and disk else []
        found = world.gather(kept)
        token = world.gather(secrets.token_urlsafe(32) if world.rank == 0 else "")[0]
        self.sources = [
            Source(ranks_of[n][k.number % len(ranks_of[n])], k.home, k.number >= len(ranks_of[n]))
            for n, ranks in ranks_of.items()
            for k in (found[ranks[0]] if ranks else ())
        ]
        orphans = [k for k in (found[mine[0]] if mine else ()) if k.number >= loaders]
        self.folder = Path(directory) / f"loader-{number}" if disk else None
        self.budget = CacheBudget(
            memory=memory // loaders,
            disk=max(0, disk - sum(k.bytes for k in orphans)) // loaders,
            dir=str(self.folder or ""),
            inherited=tuple(
                str(Path(directory) / f"loader-{k.number}") for k in orphans if k.number % loaders == number
            ),
        )
        moved = any(s.inherited or s.home != Home(s.rank, world.data) for s in self.sources)  # stage 0: rank = replica
        self.peers = PeerSettings(own_address(), token) if moved and world.is_first_stage else None

    def on_start(self, trainer: Trainer) -> None:
        """Peers exchange addresses; then it is written down whose data the folders hold from now on."""
        loader: Any = trainer.loader
        addresses = self.world.gather(loader.peer_address if self.peers is not None else "")
        if self.peers is not None:
            others = [s for s in self.sources if s.inherited or s.rank != self.world.rank]
            loader.connect_peers([addresses[s.rank] for s in others], [s.home for s in others])
        if self.folder is not None and self.world.is_first_stage:
            self.folder.mkdir(parents=True, exist_ok=True)
            home = self.world.home
            _write(self.folder, {"process": home.process, "processes": home.processes, "datasets": self.datasets})


def survey(directory: Path, loaders: int, disk: int, datasets: Sequence[str]) -> list[Kept]:
    """What earlier launches left on this node, and is of use: of these datasets, and, beyond the folders that this launch's
    loaders go on with, not served before and within the budget. What is beyond and of no use is removed."""
    out: list[Kept] = []
    inherited = 0
    for number, folder in sorted((int(m[1]), p) for p in directory.glob("loader-*") if (m := _FOLDER.match(p.name))):
        record = _read(folder)
        usable = record is not None and record["datasets"] == list(datasets)
        held = _bytes(folder)
        if number >= loaders:
            usable = usable and record is not None and not record.get("served")
            if not usable or inherited + held > _INHERITED * disk:
                _remove(folder)
                continue
            inherited += held
            _write(folder, {**record, "served": True} if record else {})
        if usable and record is not None:
            out.append(Kept(number, Home(record["process"], record["processes"]), held))
    return out


def own_address() -> str:
    """The address of the interface that leads to the launch's first rank: the job's network, not every one."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect(address)
        return str(probe.getsockname()[0])


def _read(folder: Path) -> dict[str, Any] | None:
    """A folder's record, or None where it has none that makes sense."""
    try:
        found = json.loads((folder / _RECORD).read_text())
        Home(found["process"], found["processes"])
        return {**found, "datasets": list(found["datasets"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, record: dict[str, Any]) -> None:
    with suppress(OSError):  # a full disk: the folder is then not known to the next launch
        write_json(folder / _RECORD, record)


def _bytes(folder: Path) -> int:
    """Bytes on disk of what a folder holds."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def _remove(folder: Path) -> None:
    """Remove a folder of the cache, unless a loader of another run is using it."""
    with suppress(OSError):
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
