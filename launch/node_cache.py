"""A node's cache, shared by its loaders, from one launch to the next.

Each loader keeps its disk tier in `<data.cache.dir>/loader-<number>`, its number among the node's loaders. The file `home.json`
in this folder says whose data it holds: the data at home with process p of N. If a later launch has another number of processes,
the folders belong to processes with other homes. Then each loader serves the contents of its folder to its peers; for a unit, it
asks the peer with the folder of the process that was home to the unit. If the node has fewer loaders now, the folders that are
left over are served too, during one launch; their bytes count against `data.cache.disk`. If every folder is still with the
process that it was with, nothing is served.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_json
from tiphys.dataio.loader import CacheBudget
from tiphys.dataio.peers import PeerSettings
from tiphys.dataio.placement import Home
from tiphys.dataio.private import is_private, open_private, private_folder, read_private
from tiphys.pretrain.callbacks import Callback

if TYPE_CHECKING:
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.pretrain.trainer import Trainer

_RECORD = "home.json"
_FOLDER = re.compile(r"loader-(\d{1,6})$")
_INHERITED = (
    0.75  # largest share of the node's disk budget for left-over folders; the rest is for this launch's loaders
)


@dataclass(frozen=True)
class OldFolder:
    """A cache folder of this node that an earlier launch left: its number, whose data it holds, its bytes on disk."""

    number: int
    home: Home
    bytes: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> OldFolder:
        """The inverse of `asdict`. `survey` finds only homes with equal shares."""
        home = Home(values["home"]["process"], values["home"]["processes"])
        return cls(values["number"], home, values["bytes"])


@dataclass(frozen=True)
class ServedFolder:
    """The rank that serves an old folder now, and the home whose data it holds."""

    rank: int
    home: Home
    inherited: bool  # left over: no loader of the node continues to use it


class NodeCache(Callback):
    """This rank's part of its node's cache, and its peers if the number of processes has changed. All ranks must make it at the
    same time.

    directory     folder of the node's disk tiers; empty: memory only
    memory, disk  bytes of the node
    datasets      fingerprints of the run's datasets: left-over folders of other datasets are removed

    budget        what this rank's loader may cache
    peers         what it needs to serve others; None if no loader has anything to serve
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
        found = [[OldFolder.of(old) for old in some] for some in world.gather([asdict(old) for old in kept])]
        secret = world.gather(secrets.token_urlsafe(32) if world.rank == 0 else "")[0]
        self.served = [
            ServedFolder(rank=ranks[old.number % len(ranks)], home=old.home, inherited=old.number >= len(ranks))
            for ranks in ranks_of.values()
            for old in (found[ranks[0]] if ranks else ())
        ]
        left_over = [old for old in (found[mine[0]] if mine else ()) if old.number >= loaders]
        self.folder = Path(directory) / f"loader-{number}" if disk else None
        self.budget = CacheBudget(
            memory=memory // loaders,
            disk=max(0, disk - sum(old.bytes for old in left_over)) // loaders,
            dir=str(self.folder or ""),
            inherited=tuple(
                str(Path(directory) / f"loader-{old.number}") for old in left_over if old.number % loaders == number
            ),
        )
        # In the first stage, a rank is its replica's number
        moved = any(s.inherited or s.home != Home(s.rank, world.data) for s in self.served)
        self.peers = PeerSettings(own_address(), secret) if moved and world.is_first_stage else None

    def on_start(self, trainer: Trainer) -> None:
        """Exchange the peers' addresses; then record whose data this rank's folder holds from now on."""
        loader: Any = trainer.loader
        addresses = self.world.gather(loader.peer_address if self.peers is not None else "")
        if self.peers is not None:
            others = [s for s in self.served if s.inherited or s.rank != self.world.rank]
            loader.connect_peers([addresses[s.rank] for s in others], [s.home for s in others])
        if self.folder is not None and self.world.is_first_stage:
            private_folder(self.folder)
            home = self.world.home
            _write(self.folder, {"process": home.process, "processes": home.processes, "datasets": self.datasets})


def survey(directory: Path, loaders: int, disk: int, datasets: Sequence[str]) -> list[OldFolder]:
    """The folders of earlier launches on this node that are of use: those of these datasets.

    A left-over folder (its number is not below `loaders`) is of use only if it was not served before and fits the budget.
    Left-over folders that are of no use are removed. Folders that are not this user's own are left alone.
    """
    out: list[OldFolder] = []
    inherited = 0
    for number, folder in sorted((int(m[1]), p) for p in directory.glob("loader-*") if (m := _FOLDER.match(p.name))):
        if not is_private(folder):  # DiskTier says why, if a loader would use it
            continue
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
            home = Home(process=record["process"], processes=record["processes"])
            out.append(OldFolder(number=number, home=home, bytes=held))
    return out


def own_address() -> str:
    """The address of the interface that leads to the launch's first rank: of the job's network, not of every interface."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect(address)
        return str(probe.getsockname()[0])


def _read(folder: Path) -> dict[str, Any] | None:
    """A folder's record; None if it has no valid one."""
    try:
        with read_private(folder / _RECORD) as file:
            found = json.load(file)
        Home(found["process"], found["processes"])
        return {**found, "datasets": list(found["datasets"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, record: dict[str, Any]) -> None:
    with suppress(OSError):  # a full disk: the next launch will not know this folder
        write_json(folder / _RECORD, record)


def _bytes(folder: Path) -> int:
    """Bytes that a folder's files take on disk."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def _remove(folder: Path) -> None:
    """Remove a cache folder, unless a loader of another run is using it."""
    with suppress(OSError):
        lock = open_private(folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
