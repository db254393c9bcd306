"""The exceptions that have a meaning for the user, and the exit codes they stand for."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")

# 0 finished, 1 an unexpected exception, which another try from the newest checkpoint may survive,
# 2 bad input, 3 training failed, 75 stopped by a signal after a save: run me again, 130 ended by
# Ctrl-C. The launcher's are the same without 1.
CRASHED, BAD_INPUT, FAILED, RUN_AGAIN, INTERRUPTED = 1, 2, 3, 75, 130


def one_line(text: str, most: int = 400) -> str:
    """The text with line breaks and all else that would disturb a terminal or a log escaped.

    Names of files and answers of servers may hold such characters, and bytes that are no UTF-8.
    Of a text that is longer than ``most`` characters the middle is left out.
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = most // 2 - 2
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


class UserError(Exception):
    """Bad input: one line that names the flag, its value and the way out.

    The main program prints it as ``error: <message>`` and exits with code 2; nothing has been
    written by then. Whatever a value brings into the message, it stays a line that can be read.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Make a command: bad input is one line, Ctrl-C no traceback, and both an exit code."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED

    return run


class TrainingError(Exception):
    """Training cannot go on: one line that says where and why. Exit code 3."""


class NotFinite(Exception):
    """A loss or a gradient is NaN or infinite; the same on all workers.

    Attributes:
        rank: a worker whose own loss is not finite; None if it is the gradient, or unknown.
        step: of the epoch, counted from 0.
    """

    def __init__(self, rank: int | None, step: int = 0) -> None:
        super().__init__("not finite")
        self.rank = rank
        self.step = step


class Interrupted(Exception):
    """A signal has asked the run to stop; all workers have agreed on it at the same step."""


class PeerFailed(Exception):
    """Another worker has failed and has said why; this one ends with the same exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another worker has failed with exit code {code}")
        self.code = code
