"""Files that are complete or absent at every moment, and folders that one process owns."""

import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

# The folder of the project, which holds cifar.py.
ROOT = Path(__file__).resolve().parent.parent

_SUFFIX = ".tmp"
_LOCK = ".lock"


def write_atomically(
    path: Path,
    write: Callable[[IO[bytes]], Any],
    before: Callable[[Path], Any] = lambda _: None,
) -> None:
    """Replace a file by what ``write`` writes.

    The content goes to a temporary file beside it, is flushed to disk and renamed. The old file
    stays until then, and a failed write leaves nothing behind.

    Args:
        path: The file to replace.
        write: A function that gets the open file.
        before: A function that gets the path of the complete temporary file just before it is
            renamed.
    """
    temporary = _temporary_path(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # This flushes the new name of the file.
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, as ``write_atomically`` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


class FolderInUse(Exception):
    """Another process holds the lock of the folder; the message names the process."""


def lock_folder(folder: Path) -> IO[str]:
    """Lock a folder for this process; the kernel releases the lock when the process ends.

    Args:
        folder: The folder.

    Returns:
        The lock file, for ``unlock_folder``.

    Raises:
        FolderInUse: Another process has locked the folder.
    """
    path = folder / _LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise FolderInUse(holder or "another process") from None
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # The previous holder has removed this file since it was opened here.
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def unlock_folder(file: IO[str]) -> None:
    """Release the lock that ``lock_folder`` has returned, and remove its file."""
    with contextlib.suppress(OSError):
        os.unlink(file.name)
    file.close()


def replace_by_link(source: Path, path: Path) -> None:
    """Replace a file by a hard link to another file, or by a copy where there are no hard links.

    Args:
        source: The file to link to.
        path: The file to replace.
    """
    temporary = _temporary_path(path)
    try:
        try:
            os.link(os.path.realpath(source), temporary)  # Not a link that leads nowhere there.
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for leftover in folder.glob(f".*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise an OSError if no file can be created in the folder."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=_SUFFIX, prefix="."):
        pass


def make_output(folder: Path, flag: str = "-o") -> None:
    """Create the folder for results that an option names.

    Args:
        folder: The folder, which may exist.
        flag: The option, for the message.

    Raises:
        UserError: The folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written to ({error.strerror}); name another folder"
        ) from error


def _temporary_path(path: Path) -> Path:
    """Return the path of this process's temporary file for a file."""
    return path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
