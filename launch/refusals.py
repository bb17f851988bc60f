"""What an error means to the person who started the command: its exit status, and its sentence."""

from __future__ import annotations

import errno
import os
import traceback

from tiphys.dataio.episode import DataError
from tiphys.dataio.errors import Explained
from tiphys.dataio.messages import redacted, say
from tiphys.launch.lease import FolderInUse
from tiphys.launch.statuses import Status
from tiphys.pretrain.checkpoint_files import StorageFull
from tiphys.recipes.load import RecipeError

# A command reads what its user names, so these come from there, whoever raises them.
OF_A_COMMAND = (Explained, ValueError, OSError, ImportError, LookupError, MemoryError)
# A rank computes: a ValueError of NumPy or torch is a defect there.
OF_A_RANK = (Explained, RecipeError, DataError, OSError, ImportError, MemoryError)
# What another launch may not meet again: networks, stores, file servers, the lost process of a loader.
_PASSING = (ConnectionError, TimeoutError)
_PASSING_NAMES = {  # their modules need not be imported to ask
    ("tiphys.dataio.storage", "StoreError"),
    ("tiphys.dataio.loader", "LoaderLost"),
    ("torch", "AcceleratorError"),
}
_LASTING_NAMES = {("tiphys.dataio.storage", "ObjectChanged"), ("tiphys.dataio.storage", "AccessError")}
_OUTSIDE_NUMBERS = (errno.ESTALE, errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)
_PASSING_NUMBERS = (errno.EIO, errno.EAGAIN, *_OUTSIDE_NUMBERS)
_NO_MEMORY = (
    "no memory is left on this machine, or within a limit of it (ulimit -v, a control group); lower data.cache.memory, "
    "data.prefetch or the micro-batch, or raise the limit"
)
_NOT_SENTENCES = (LookupError, MemoryError, UnicodeError)  # such a message may be one word, or none


def status_of(error: BaseException, expected: tuple[type[BaseException], ...] = OF_A_COMMAND) -> Status:
    """The exit status for an error. CRASHED if it is a defect of Tiphys, whose traceback should be shown."""
    if isinstance(error, KeyboardInterrupt):
        return Status.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return Status.BROKEN_PIPE
    if isinstance(error, FolderInUse):
        return Status.IN_USE
    if isinstance(error, StorageFull):
        return Status.STORAGE_FULL
    if expected is OF_A_RANK and passing(error):
        return Status.GAVE_UP
    if isinstance(error, expected) or _device_memory(error):
        return Status.REFUSED
    return Status.CRASHED


def passing(error: BaseException) -> bool:
    """Whether what a rank met may be gone at the next launch. The class of the error decides, never its words."""
    names = {(kind.__module__, kind.__name__) for kind in type(error).__mro__}
    if isinstance(error, PermissionError | FileNotFoundError) or names & _LASTING_NAMES:
        return False
    numbered = isinstance(error, OSError) and error.errno in _PASSING_NUMBERS
    return isinstance(error, _PASSING) or bool(names & _PASSING_NAMES) or numbered


def outside(error: BaseException) -> bool:
    """Whether the cause is a store, a file server or a network, which other machines would meet as well."""
    stored = ("tiphys.dataio.storage", "StoreError") in {
        (kind.__module__, kind.__name__) for kind in type(error).__mro__
    }
    numbered = isinstance(error, OSError) and error.errno in _OUTSIDE_NUMBERS
    return stored or numbered or isinstance(error, _PASSING)


def sentence(error: BaseException) -> str:
    """The message of an error, for people. An error of the operating system names its file first."""
    full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if full or (isinstance(error, MemoryError) and len(str(error).split()) < 4):
        return _NO_MEMORY
    if isinstance(error, OSError) and error.strerror and type(error).__str__ is OSError.__str__:
        file = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{file}{error.strerror}"
    if isinstance(error, FileNotFoundError) and " " not in str(error):
        return f"{error}: there is no such file"
    if _device_memory(error):
        return f"{str(error).splitlines()[0]} Lower deepspeed.train_micro_batch_size_per_gpu, or set model.checkpointing=true"
    text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
    if isinstance(error, _NOT_SENTENCES) and len(text.split()) < 4:
        text = f"{type(error).__name__} {text}".strip() + "; --traceback shows where"
    return text or f"{type(error).__name__}; --traceback shows where"


def show(error: BaseException, status: Status, *, with_traceback: bool = False, what: str = "") -> None:
    """Print the sentence of an error to stderr; its traceback too if it is a defect, or if it is asked for.

    what   what failed, before the sentence
    """
    if with_traceback or status == Status.CRASHED:
        say("".join(traceback.format_exception(error)), error=True, end="")
    say(f"tiphys: {what}{redacted(sentence(error))}", error=True)


def _device_memory(error: BaseException) -> bool:
    """An accelerator's memory is full. torch is not imported, because most commands do without it."""
    return type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
