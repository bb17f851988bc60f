"""Exit statuses of `tiphys` and of every rank of a run."""

from __future__ import annotations

import signal
from enum import IntEnum


class Status(IntEnum):
    """A status, and what it means to the person or the scheduler that started the command."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Status:
        made = int.__new__(cls, value)
        made._value_, made.meaning = value, meaning
        return made

    DONE = 0, "done"
    CRASHED = 1, "an error inside Tiphys; the traceback says where"
    USAGE = 2, "the command line is not valid"
    REFUSED = 3, "the recipe, the data or a file cannot be used; the message says what to change"
    IN_USE = 4, "another command trains in the same run folder; the message names its host and process"
    DIVERGED = 5, "the loss became infinite or not a number; the last checkpoint is from before that"
    STORAGE_FULL = 6, "no checkpoint could be written for `checkpoint.patience` minutes; the message names the folder"
    NOT_EVALUATED = 7, "trained and saved, but the evaluation failed; the same command tries it again"
    NOT_PUBLISHED = 8, "trained and saved, but the policy could not be published; `tiphys publish` tries it again"
    NOT_SAVED = 70, "stopped before the last steps were saved; the same command resumes from the last checkpoint"
    GAVE_UP = 75, "lost a process again and again without a newer checkpoint; the same command tries again"
    INTERRUPTED = 130, "stopped by Ctrl-C (SIGINT); a run is saved, and the same command resumes it"
    BROKEN_PIPE = 141, "the program that reads the output has ended"
    TERMINATED = 143, "stopped by SIGTERM; a run is saved, and the same command resumes it"

    @property
    def finished(self) -> bool:
        """The run has been trained to its end."""
        return self in (Status.DONE, Status.NOT_EVALUATED, Status.NOT_PUBLISHED)

    @property
    def stopped(self) -> bool:
        """A signal stopped the run, and it was saved."""
        return self in (Status.INTERRUPTED, Status.TERMINATED)


def stopped_by(number: int) -> Status:
    """The status of a run that a signal stopped. All signals but SIGINT count as SIGTERM."""
    return Status.INTERRUPTED if number == signal.SIGINT else Status.TERMINATED


def table() -> str:
    """All statuses, a line each, for `tiphys --help`."""
    return "\n".join(f"  {status.value:>3}  {status.meaning}" for status in Status)
