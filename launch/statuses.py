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
    TRY_AGAIN = 75, "a process of the run was lost; the same command resumes"
    INTERRUPTED = 130, "stopped by Ctrl-C (SIGINT) and saved; the same command resumes"
    BROKEN_PIPE = 141, "the program that reads the output has ended"
    TERMINATED = 143, "stopped by SIGTERM and saved; the same command resumes"


def stopped_by(signal: int) -> Status:
    """The status of a run that SIGINT or SIGTERM stopped."""
    return Status(128 + signal)


def table() -> str:
    """All statuses, a line each, for `tiphys --help`."""
    return "\n".join(f"  {status.value:>3}  {status.meaning}" for status in Status)
