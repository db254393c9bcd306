"""The exceptions that have a meaning for the user, their exit codes, and how text is printed.

A text may hold what a terminal, a log or a stranger must not get: ``one_line``,
``escape_unprintable`` and ``without_secrets`` see to that.
"""

import contextlib
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import ParamSpec

P = ParamSpec("P")

# The exit codes are 0, finished; 1, an unexpected exception, which a restart from the newest
# checkpoint may get past; 2, bad input; 3, training failed; 75, stopped by a signal after a save,
# to be run again; and 130, ended by Ctrl-C. The launcher has the same codes except 1.
CRASHED, BAD_INPUT, FAILED, RUN_AGAIN, INTERRUPTED = 1, 2, 3, 75, 130
# A worker that ends with one of these has said why, and starting it again would not help.
EXPLAINED = BAD_INPUT, FAILED, RUN_AGAIN
# What a shell reports of a tool whose output nobody reads any more, as of ``| head``.
_READER_GONE = 128 + signal.SIGPIPE


def one_line(text: str, most: int = 400) -> str:
    """Return a text with all characters escaped that would disturb a terminal or a log.

    Names of files and answers of servers may hold line breaks, control characters and bytes that
    are not valid UTF-8.

    Args:
        text: The text.
        most: The length above which the middle of the text is left out.
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = most // 2 - 2
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


def without_secrets(text: str) -> str:
    """Return a text in which no address tells more than scheme, host and path.

    Addresses may hold a user name and a password, and signatures or tokens in their query or
    fragment, of which ``?...`` is left. Brackets, quotes and commas after an address stay.

    Args:
        text: The text, with any number of http, https and ftp addresses in it.
    """

    def shorten(address: re.Match[str]) -> str:
        # A password may hold a slash by mistake: what follows a colon is then no port.
        whole = re.sub(r"^(?:[^/]*@|[^/@[]*:(?!\d*[/?#])[^@]*@)", "", address[2])
        shown = re.split("[?#]", whole)[0]
        query = whole[len(shown) :]
        closing = query[len(query.rstrip("])}>'\"`,;:")) :]
        return address[1] + shown + ("?..." if query else "") + closing

    scheme = "(?:ht|f)tps?://"
    return re.sub(rf"({scheme})((?:(?!{scheme})\S)*)", shorten, text, flags=re.IGNORECASE)


def reason_of(error: BaseException) -> str:
    """Return why something has failed: in the words of the system, else of the exception."""
    return getattr(error, "strerror", None) or str(error).strip() or type(error).__name__


class UserError(Exception):
    """Bad input. The message is one line that names the flag, its value and the remedy.

    The main program prints it as ``error: <message>`` and exits with code 2. Nothing has been
    written by then.
    """

    def __init__(self, message: str) -> None:
        """Create an error whose message is one line, whatever text a value has brought into it."""
        super().__init__(one_line(message))


def require_packages(flag: str, *packages: str) -> None:
    """Raise a UserError where an optional package is missing.

    Args:
        flag: What needs the packages, for the message.
        packages: Their names, which are also those of their modules.
    """
    missing = " ".join(name for name in packages if find_spec(name) is None)
    if missing:
        raise UserError(f"{flag}: needs {missing}; install with 'pip install {missing}'")


def escape_unprintable() -> None:
    """Let standard output escape the characters that the encoding of the terminal lacks.

    The name of a folder or a class must not end what prints it. Standard error does so by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):  # It is full or closed; printing will tell.
            sys.stdout.reconfigure(errors="backslashreplace")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Turn bad input into one line and Ctrl-C into no traceback, and both into an exit code.

    A reader of standard output that has gone away, as of ``| head``, ends the command in silence.

    Args:
        main: The function of a command, which returns an exit code.

    Returns:
        The same function without these exceptions.
    """

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        escape_unprintable()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            try:
                print(f"error: {error}", file=sys.stderr, flush=True)
            except OSError:  # What is left would fail at the end again, with another exit code.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            return BAD_INPUT
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            if not _reader_has_gone():  # It was another pipe.
                raise
            return _READER_GONE
        finally:
            _reader_has_gone()  # What is left would fail at the end of the process, with a message.

    return run


def _reader_has_gone() -> bool:
    """Return whether nobody reads standard output; what is left to print then leads nowhere."""
    try:
        sys.stdout.flush()
        output = select.poll()
        output.register(sys.stdout, 0)  # It tells of errors whatever it is asked for.
        gone = bool(output.poll(0))
    except BrokenPipeError:
        gone = True
    except (AttributeError, OSError, ValueError):  # It is closed, or no file at all, or full.
        gone = False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


class TrainingError(Exception):
    """Training cannot continue. The message is one line that says where and why. Exit code 3."""


class NotFinite(Exception):
    """A loss or a gradient is NaN or infinite, in the same way on all workers.

    Attributes:
        rank: A worker whose own loss is not finite; None if a gradient is not, or if no worker is
            known.
        step: The step of the epoch, counted from 0.
    """

    def __init__(self, rank: int | None, step: int = 0) -> None:
        """Create an exception for a rank and a step."""
        super().__init__("not finite")
        self.rank = rank
        self.step = step


class Interrupted(Exception):
    """A signal has asked the run to stop, and all workers have agreed on it at the same step."""


class PeerFailed(Exception):
    """Another worker has failed and has reported why; this one ends with the same exit code.

    Attributes:
        code: The exit code.
    """

    def __init__(self, code: int) -> None:
        """Create an exception for an exit code."""
        super().__init__(f"another worker has failed with exit code {code}")
        self.code = code
