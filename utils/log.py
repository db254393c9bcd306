"""The lines that a run prints: after ``set_rank`` on rank 0 alone, whichever module calls.

A line goes to standard output as it is, because people and programs read log files of runs by their
lines. What ends a run is another matter; utils/runtime/exit_codes.py prints it to standard error.
"""

import logging
import os
import sys
from functools import cache

from utils.errors import escape_unprintable, one_line

_logger = logging.getLogger("cifar")


class _StandardOutput(logging.Handler):
    """Prints to the standard output of the moment.

    A reader that has gone away, as of ``| head``, does not end the training.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_logger.addHandler(_StandardOutput())
_logger.propagate = False
_logger.setLevel(logging.INFO)


def set_rank(rank: int) -> None:
    """Let this process print on rank 0 and be silent on any other rank."""
    _logger.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)


def info(text: str) -> None:
    """Print a line."""
    _logger.info("%s", text)


def warning(text: str) -> None:
    """Print a line that begins with ``warning:``."""
    _logger.warning("warning: %s", text)


@cache
def warning_once(text: str) -> None:
    """Print a warning, as one line, unless this process has tried to print the same before."""
    warning(one_line(text))


def note(text: str) -> None:
    """Print a line that begins with ``note:``."""
    _logger.info("note: %s", text)


def draws_progress() -> bool:
    """Return whether a progress bar can be drawn: rank 0, on a terminal."""
    return _logger.isEnabledFor(logging.INFO) and sys.stdout.isatty()


def open_streams() -> None:
    """Make the standard streams such that printing to them ends nothing.

    One that was closed from the start, for which Python has None, leads nowhere. Standard output
    escapes what its encoding lacks.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # mostly the number itself
            if descriptor != number:
                os.dup2(descriptor, number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    escape_unprintable()
