"""Exit statuses of `tiphys` and of every rank of a run."""

from __future__ import annotations

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
    NOT_EVALUATED = 4, "trained and saved, but the evaluation failed; the same command tries it again"
    DIVERGED = 5, "the loss became infinite or not a number; the last checkpoint is from before that"
    NOT_PUBLISHED = 6, "trained and saved, but the policy could not be published; `tiphys publish` tries it again"
    TRY_AGAIN = 75, "a process of the run was lost; the same command resumes"
    INTERRUPTED = 130, "stopped by Ctrl-C (SIGINT); a run is saved, and the same command resumes it"
    BROKEN_PIPE = 141, "the program that reads the output has ended"
    TERMINATED = 143, "stopped by SIGTERM; a run is saved, and the same command resumes it"


def stopped_by(signal: int) -> Status:
    """The status of a run that SIGINT or SIGTERM stopped."""
    return Status(128 + signal)


def table() -> str:
    """All statuses, a line each, for `tiphys --help`."""
    return "\n".join(f"  {status.value:>3}  {status.meaning}" for status in Status)
