"""Stands for the launcher and its ranks, in one small process: fake_launch.py PLAN --launch=NUMBER:TOKEN:RUN_DIR

PLAN   what the launches do, one word each, divided by commas; the last word also holds for all later launches
       done      both ranks report that they are done
       lost      rank 0 reports that it lost rank 1; the launcher's status is that of a rank killed by signal 9
       nothing   no report, and status 0
       refused   rank 1 reports data that cannot be used
       saves     a newer checkpoint, then lost
       waits     ends on SIGTERM, and reports that it is saved
       deaf      ignores SIGTERM
       stopped   stopped by SIGSTOP in a phase that may take a moment
       holding   holds Python's lock for ever in such a phase
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time

from tiphys.launch.attendance import Attendance, taken
from tiphys.launch.launches import RankReport
from tiphys.launch.parents import die_with_parent
from tiphys.launch.statuses import Status
from tiphys.pretrain.phases import phases

die_with_parent()
words, given = taken(sys.argv[1:])
attendance = Attendance(given)
assert attendance.launch is not None
launch, plan = attendance.launch, words[0].split(",")
what = plan[min(launch.number, len(plan)) - 1]
phases.mark("rows", 13)


def leave(status: Status, code: int, ranks: tuple[int, ...] = (0, 1), *, lost: bool = False) -> None:
    for rank in ranks:
        launch.write(RankReport(rank, 12, "for a test", status, lost))
    os._exit(code)


if what == "done":
    leave(Status.DONE, 0)
if what == "refused":
    leave(Status.REFUSED, 3, (1,))
if what == "nothing":
    os._exit(0)
if what == "saves":
    folder = launch.run_dir / "checkpoints" / f"step-{10 * launch.number:08d}"
    folder.mkdir(parents=True)
    manifest = {"version": 1, "step": 10 * launch.number, "world": 1, "save": "", "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
if what in ("lost", "saves"):
    leave(Status.GAVE_UP, 247, (0,), lost=True)
if what == "waits":
    signal.signal(signal.SIGTERM, lambda *_: leave(Status.TERMINATED, 1))
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what in ("stopped", "holding"):
    phases._usual = 0.2
    phases.mark("forward", 13)
if what == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
if what == "holding":
    ctypes.PyDLL(None).pause()  # a call that does not release the lock
    ctypes.PyDLL(None).pause()
(launch.run_dir / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(1)
