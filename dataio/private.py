"""Files that another user of the machine may have put there: what is ours is told from what is not before it is used.

A cache folder may lie where other users may write, such as /tmp. They could put links or whole folders where ours would be, so
that we would overwrite a file elsewhere or take their data for ours.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from tiphys.dataio.episode import DataError


def private_folder(path: str | Path) -> Path:
    """A folder that only this user can read and write. It is made if it does not exist, and its mode becomes 0700.

    Raises
    ------
    DataError
        If the path is a link or no folder, if the folder belongs to another user, or if other users may write to it, so that
        what it holds may not be ours.
    OSError
        If it cannot be made or opened.
    """
    folder = Path(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    reason = _not_ours(folder)
    if reason:
        raise DataError(f"{folder} is not used as a cache, because {reason}")
    return folder


def is_private(path: str | Path) -> bool:
    """Whether a path is a folder that `private_folder` accepts."""
    return not _not_ours(Path(path))


def _not_ours(folder: Path) -> str:
    """Why a folder is not used; empty if it is ours. The mode of ours becomes 0700."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if folder.is_symlink():
            return "it is a link; remove it, or name the folder that it points to"
        return f"it cannot be opened as a folder ({error.strerror})"
    try:
        found = os.fstat(handle)
        if found.st_uid != os.geteuid():
            return f"it belongs to another user (uid {found.st_uid}); name another folder"
        if found.st_mode & 0o022:
            return "other users may write to it; remove it, or if all that it holds is yours, run `chmod 700` on it"
        if found.st_mode & 0o077:
            os.fchmod(handle, 0o700)
    finally:
        os.close(handle)
    return ""


def open_private(path: str | Path, flags: int) -> int:
    """Open a file of a private folder, with mode 0600 if it is made. Links are not followed.

    Raises OSError, also if the file is no regular file, belongs to another user, or has another name elsewhere.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(handle)
        raise PermissionError(1, "it is not a file of this user's own", str(path))
    return handle


def read_private(path: str | Path) -> BinaryIO:
    """A file of a private folder, open for reading. Raises OSError as `open_private`."""
    return open(open_private(path, os.O_RDONLY), "rb")


def read_regular(path: str | Path, limit: int) -> bytes:
    """The content of a regular file.

    Raises
    ------
    DataError
        If the path is something else than a file (a device, a pipe), or the file has more than `limit` bytes.
    OSError
        If it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):  # `open` would refuse a folder in words of its own
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise DataError(f"{path} is {what}, so it is not read")
    with open(handle, "rb") as file:
        data = b"" if found.st_size > limit else file.read(limit + 1)
        if found.st_size > limit or len(data) > limit:
            raise DataError(f"{path} has more than {limit:,} bytes, which is the most that is read of such a file")
        return data
