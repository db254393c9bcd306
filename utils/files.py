"""Files that are complete or absent at every moment."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_SUFFIX = ".tmp"


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace a file by what ``write`` puts into it.

    The content goes to a temporary file beside it, is flushed to disk and renamed; until then
    the old file stays. A failed write leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def clear_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder."""
    for leftover in folder.glob(f".*{_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError where no file can be made in the folder."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=_SUFFIX, prefix="."):
        pass
