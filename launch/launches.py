"""`<run.dir>/launches/0007`: what the ranks of one launch of a run leave behind.

Every rank writes `rank-00003.json` before it exits: its status, why, and after which step. A rank without this file was lost:
killed, or on a machine that failed. The launcher's own exit status cannot tell these apart, because it is one number for all
ranks, and 0 if the launcher itself was killed.
"""

from __future__ import annotations

import json
import re
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tiphys.dataio.atomic import write_json
from tiphys.launch.statuses import Status

_NUMBER = re.compile(r"\d{4,}")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class RankReport:
    """How one rank ended.

    step    training steps that it had done
    cause   in words; empty if it is done
    status  its exit status
    lost    it ended because it lost its connection to another rank
    outside it ended because of a store, a file server or a network, so its own machine is not to blame
    """

    rank: int
    step: int
    cause: str
    status: Status
    lost: bool = False
    host: str = field(default_factory=socket.gethostname)
    outside: bool = False


class Launch:
    """The folder of one launch.

    Attributes
    ----------
    run_dir : Path
    number : int
        1 for the first launch of the run.
    """

    def __init__(self, run_dir: str | Path, number: int) -> None:
        self.run_dir, self.number = Path(run_dir), number
        self.folder = self.run_dir / "launches" / f"{number:04d}"

    @classmethod
    def new(cls, run_dir: str | Path) -> Launch:
        """Make the folder of the next launch."""
        parent = Path(run_dir) / "launches"
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in parent.iterdir() if _NUMBER.fullmatch(p.name)), default=0)
        while True:
            number += 1
            launch = cls(run_dir, number)
            try:
                launch.folder.mkdir()
            except FileExistsError:
                continue
            return launch

    def write(self, report: RankReport) -> None:
        """Leave a report. If that is impossible (a full disk), this rank counts as lost."""
        with suppress(OSError):
            write_json(self.folder / f"rank-{report.rank:05d}.json", asdict(report))

    def reports(self) -> list[RankReport]:
        """The reports of this launch, by rank. Files that are no reports are left out."""
        found = []
        for path in sorted(self.folder.glob("rank-*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                with path.open("rb") as file:
                    values = json.loads(file.read(_MOST_BYTES))
                found.append(
                    RankReport(
                        rank=int(values["rank"]),
                        step=int(values["step"]),
                        cause=str(values["cause"]),
                        status=Status(values["status"]),
                        lost=bool(values["lost"]),
                        outside=bool(values.get("outside", False)),
                        host=str(values["host"]),
                    )
                )
        return found

    def beat_file(self, rank: int) -> Path:
        """Where a rank says what it does now (`tiphys.pretrain.phases`)."""
        return self.folder / f"rank-{rank:05d}.beat"

    def stack_file(self, rank: int) -> Path:
        """Where a rank that stands still writes the stacks of its threads."""
        return self.folder / f"rank-{rank:05d}.stacks"
