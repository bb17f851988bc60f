"""Why ranks of a run ended: a rank that fails leaves `<run.dir>/ranks/rank-00003.json` before its connections close.

The other ranks only see a connection break. They read these files to say, and to exit with, what the failed rank meant.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tiphys.dataio.atomic import write_json
from tiphys.launch.statuses import Status


@dataclass(frozen=True)
class RankReport:
    """Why one rank ended.

    step    training steps that it had done
    cause   type and message of its error
    status  its exit status
    """

    rank: int
    step: int
    cause: str
    status: Status


def remove(run_dir: str | Path) -> None:
    """Remove the reports of an earlier launch."""
    shutil.rmtree(_folder(run_dir), ignore_errors=True)


def write(run_dir: str | Path, report: RankReport) -> None:
    """Leave a report. If that is impossible (a full disk), the other ranks only say that they lost this one."""
    with suppress(OSError):
        write_json(_folder(run_dir) / f"rank-{report.rank:05d}.json", asdict(report))


def read(run_dir: str | Path) -> list[RankReport]:
    """The reports of this launch, by rank. Files that are no reports are left out."""
    found = []
    for path in sorted(_folder(run_dir).glob("rank-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                RankReport(int(values["rank"]), int(values["step"]), str(values["cause"]), Status(values["status"]))
            )
    return found


def _folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "ranks"
