"""What the user sees of a launcher and its workers, and what the launcher says of their end."""

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

from utils.errors import BAD_INPUT, RUN_AGAIN

# Seconds after which silence means that what has come of a line or a traceback is all of it.
IDLE = 0.2

_REPORT = b"torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
_TAG = re.compile(rb"\[\d+\]<std(out|err)>:")
# What horovodrun says of itself.
_TAGGED_REPORT = b"RuntimeError: Horovod detected that one or more processes exited"
_TAGGED_FAILURE = re.compile(rb"Process (\d+) exit with status code (\d+)\.")
_TAGGED_NOISE = re.compile(
    rb"Terminating remaining workers after|"
    rb"\[\d+\]<stderr>:(Terminated|Killed|Aborted)( \(core dumped\))?$|"
    rb".*/multiprocessing/resource_tracker\.py:|  warnings\.warn\('resource_tracker:"
)
_ENDED_BY_SIGNAL = (
    b"torch.distributed.elastic.multiprocessing.api.SignalException",
    b"KeyboardInterrupt",
)


class Failure(NamedTuple):
    """A worker in the launcher's report; a negative code is the signal that ended it."""

    when: str
    rank: int
    code: int


class Screen:
    """Passes a stream on, except what the launcher says about the end of its workers.

    Workers and launcher write to one pipe. The launcher's log lines carry its process id; a
    traceback is held back until its last line tells whose it is; the report comes last.

    Attributes:
        failures: what the report lists; the root cause, as the launcher sees it, is the last.
        interrupted: set it after a signal; tracebacks that only say so are then left out.
    """

    def __init__(self, out: int, launcher: int) -> None:
        self.out = out
        self.failures: list[Failure] = []
        self.interrupted = False
        self._log_line = re.compile(rb"[IWEF]\d{4} [\d:.]+ %d .*torch/distributed/" % launcher)
        self._log: list[bytes] = []
        self._traceback: list[bytes] = []
        self._reporting = False
        self._when, self._rank = "", -1

    def copy(self, pipe: int) -> None:
        """Pass on what comes through a pipe until its end, and close it."""
        rest = b""
        while True:
            if not select.select([pipe], [], [], IDLE)[0]:
                if rest or self._traceback:
                    self.flush()
                    self.write(rest)
                    rest = b""
                continue
            chunk = os.read(pipe, 65536)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self.line(line + b"\n")
            if rest.endswith(b"\r"):  # a line that is drawn again and again
                self.write(rest)
                rest = b""
        os.close(pipe)
        self.flush()
        self.write(rest)

    def line(self, line: bytes) -> None:
        """Take one line, with its end."""
        if _TAGGED_NOISE.match(line):
            return
        if found := _TAGGED_FAILURE.match(line):
            code = int(found[2])
            # The first to end comes first here; a shell adds 128 to a signal.
            code = code if code < 128 else 128 - code
            self.failures.insert(0, Failure(f"{time.monotonic():.0f}", int(found[1]), code))
            return
        line = _TAG.sub(b"", line)
        if self._reporting:
            self._read_report(line)
        elif self._log_line.match(line):
            self._log.append(line)
        elif line.startswith(b"Traceback (most recent call last)"):
            self.flush()
            self._traceback = [line]
        elif self._traceback and line.startswith((b" ", b"\t")):
            self._traceback.append(line)
        elif self._traceback and line.startswith((_REPORT, _TAGGED_REPORT)):
            self._traceback = []
            self._reporting = True
        elif self._traceback and self.interrupted and line.startswith(_ENDED_BY_SIGNAL):
            self._traceback = []
        else:
            self.flush()
            self.write(line)

    def flush(self) -> None:
        """Show the traceback that has been held back."""
        self.write(b"".join(self._traceback))
        self._traceback = []

    def show_log(self) -> None:
        """Show the launcher's log: it has failed by itself and that may say why."""
        self.write(b"".join(self._log))

    def write(self, text: bytes) -> None:
        """Write to the screen; a reader who has gone away does not end the training."""
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(self.out, text) :]

    def _read_report(self, line: bytes) -> None:
        """Take a line of the table, such as ``  rank      : 1 (local_rank: 1)``."""
        found = re.match(rb"\s+(time|rank|exitcode)\s*: (\S+)", line)
        if found is None:
            return
        key, value = found[1].decode(), found[2].decode()
        if key == "time":
            self._when = value
        elif key == "rank":
            self._rank = int(value)
        else:
            self.failures.append(Failure(self._when, self._rank, int(value)))


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The worker that failed first, given the launcher's report.

    The launcher looks at its workers a few times a second, so the worker whose connection broke
    may pass for the first when another one was killed. Among those of the same second a signal
    counts first (but for SIGTERM, which the launcher itself sends), then the codes that mean more
    than "failed".
    """
    first = failures[-1]

    def rank_of_causes(failure: Failure) -> int:
        if failure.code < 0:
            return 0 if failure.code != -signal.SIGTERM else 3
        return 1 if failure.code in (BAD_INPUT, RUN_AGAIN) else 2

    same_second = [failure for failure in reversed(failures) if failure.when == first.when]
    return min(same_second, key=rank_of_causes)
