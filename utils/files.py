"""Files that are complete or absent at every moment."""

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
    """Replace a file by what ``write`` puts into it.

    The content goes to a temporary file beside it, is flushed to disk and renamed; until then
    the old file stays. A failed write leaves nothing behind.

    Args:
        path: the file.
        write: gets the open file.
        before: gets the name of the complete temporary file, just before it is renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
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
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, as ``write_atomically`` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


class FolderInUse(Exception):
    """Another process holds the folder's lock; the text says which."""


def lock_folder(folder: Path) -> IO[str]:
    """Claim a folder for this process; the kernel lets go of it when the process ends.

    Returns:
        The lock file. ``unlock_folder`` removes it.

    Raises:
        FolderInUse: names the other process.
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
        try:
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()  # its holder has removed it meanwhile
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def unlock_folder(file: IO[str]) -> None:
    """Let go of a folder."""
    with contextlib.suppress(OSError):
        os.unlink(file.name)
    file.close()


def replace_by_link(source: Path, path: Path) -> None:
    """Replace a file by another name of ``source``, or by a copy where there are no hard links."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder."""
    for leftover in folder.glob(f".*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError where no file can be made in the folder."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=_SUFFIX, prefix="."):
        pass


def make_output(folder: Path) -> None:
    """Make the folder that -o names for results.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise UserError(
            f"-o {folder}: cannot be written to ({error.strerror}); name another folder"
        ) from error
