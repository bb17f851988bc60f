"""What `deepspeed` starts as every rank: `deepspeed launch/train.py RECIPE [key=value …] [OPTIONS]`, with the options --verbose,
--traceback and --accept-changed-data. `tiphys train` adds --launch (`launch/attendance.py`)."""

import os
import sys

_HERE = os.path.dirname(os.path.realpath(__file__))
if sys.path and os.path.realpath(sys.path[0]) == _HERE:
    # Started by its path: import the package `tiphys` beside this folder, not the modules inside it.
    sys.path[0] = os.path.dirname(_HERE)

from tiphys.dataio.messages import say
from tiphys.dataio.python_path import leave_current_folder

if __name__ == "__main__":
    leave_current_folder()  # before anything else is imported

import logging
import signal
from collections.abc import Sequence

from tiphys.launch.attendance import Attendance, taken
from tiphys.launch.check import check
from tiphys.launch.parents import PARENT, die_with_parent
from tiphys.launch.refusals import OF_A_RANK, show, status_of
from tiphys.launch.statuses import Status
from tiphys.launch.submit import ACCEPT_CHANGED_DATA, PACKED, unpacked

# DeepSpeed warns of this on every rank at every start with a schedule, although nothing is wrong.
_HARMLESS = "Attempting to get learning rate from scheduler before it has started"


def main(argv: Sequence[str] | None = None) -> Status:
    words = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    if len(words) == 1 and words[0].startswith(PACKED):
        folder, words = unpacked(words[0])
        try:
            os.chdir(folder)
        except OSError as error:
            show(error, Status.REFUSED, what="the folder in which the command was started: ")
            return Status.REFUSED
    words, launch = taken(words)
    attendance = Attendance(launch)
    try:
        status = _train(words, attendance)
        attendance.report(status, "it ended before training began")
        return status
    finally:
        attendance.close()


def _train(words: Sequence[str], attendance: Attendance) -> Status:
    recipe_and_overrides = [a for a in words if a not in ("--verbose", "--traceback", ACCEPT_CHANGED_DATA)]
    if not recipe_and_overrides:
        usage = (
            f"usage: deepspeed launch/train.py RECIPE [key=value …] [--verbose] [--traceback] [{ACCEPT_CHANGED_DATA}]"
        )
        say(usage, error=True)
        return Status.USAGE
    if "--verbose" not in words:
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.getMessage() != _HARMLESS)  # noqa: TID251
    try:
        recipe = check(recipe_and_overrides[0], recipe_and_overrides[1:], data=False)
    except Exception as error:
        status = status_of(error, OF_A_RANK)
        attendance.report(status, str(error))
        show(error, status, with_traceback="--traceback" in words)
        return status
    from tiphys.launch.run import run

    return run(
        recipe, attendance, with_traceback="--traceback" in words, accept_changed_data=ACCEPT_CHANGED_DATA in words
    )


if __name__ == "__main__":
    if PARENT in os.environ:
        die_with_parent(int(os.environ[PARENT]))
    elif "CROSS_RANK" in os.environ:  # DeepSpeed's launcher started this rank
        die_with_parent()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C outside the training loop ends a rank without a traceback
    sys.exit(main())
