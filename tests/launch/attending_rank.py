"""A rank that only attends, for tests: attending_rank.py HOW --launch=NUMBER:TOKEN:RUN_DIR

HOW  starting   it is not training yet
     training   it notes a signal, as the training loop does, and never gets to the end of its step
     watching   it watches the lease
"""

from __future__ import annotations

import os
import signal
import sys
import time

from tiphys.launch.attendance import Attendance, taken
from tiphys.launch.lease import Watch

(how,), given = taken(sys.argv[1:])
attendance = Attendance(given)
attendance.step, attendance.deadline = 7, 0.3 if how == "training" else 25.0
launch = attendance.launch
assert launch is not None
if how == "watching":
    Watch(launch.run_dir, attendance.token, launch.number, attendance._lost_lease, attendance._ask_to_stop)
if how == "training":
    signal.signal(signal.SIGTERM, lambda *_: None)
(launch.run_dir / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(1)
