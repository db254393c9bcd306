"""The output of a launcher and its workers, without what the launcher says about their end."""

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

from utils.errors import BAD_INPUT, RUN_AGAIN

# Seconds of silence after which an unfinished line or traceback is taken to be complete.
FLUSH_DELAY = 0.2

_TORCH_REPORT = b"torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
# The tag that horovodrun puts before every line of a worker, and what it prints itself.
_HOROVOD_TAG = re.compile(rb"\[\d+\]<std(out|err)>:")
_HOROVOD_REPORT = b"RuntimeError: Horovod detected that one or more processes exited"
_HOROVOD_FAILURE = re.compile(rb"Process (\d+) exit with status code (\d+)\.")
_HOROVOD_NOISE = re.compile(
    rb"Terminating remaining workers after|"
    rb"\[\d+\]<stderr>:(Terminated|Killed|Aborted)( \(core dumped\))?$|"
    rb".*/multiprocessing/resource_tracker\.py:|  warnings\.warn\('resource_tracker:"
)
_ENDED_BY_SIGNAL = (
    b"torch.distributed.elastic.multiprocessing.api.SignalException",
    b"KeyboardInterrupt",
)


class Failure(NamedTuple):
    """A failed worker in the launcher's report.

    Attributes:
        time: The time of the failure to the second, as a text.
        rank: The rank of the worker.
        code: Its exit code, or the negative number of the signal that ended it.
    """

    time: str
    rank: int
    code: int


class OutputFilter:
    """Passes a stream on, except what the launcher says about the end of its workers.

    The workers and the launcher write to one pipe. The launcher's log lines carry its process id. A
    traceback is held back until its last line tells whether it is the launcher's. The launcher's
    report is the last thing it prints.

    Attributes:
        failures: The failures that the report lists. The last one is the root cause, as the
            launcher sees it.
        interrupted: Whether a signal has come. Tracebacks that say only that are then left out.
    """

    def __init__(self, out: int, launcher: int) -> None:
        """Create a filter.

        Args:
            out: The file descriptor to write to.
            launcher: The process id of the launcher.
        """
        self.failures: list[Failure] = []
        self.interrupted = False
        self._out = out
        self._log_line = re.compile(rb"[IWEF]\d{4} [\d:.]+ %d .*torch/distributed/" % launcher)
        self._log: list[bytes] = []
        self._traceback: list[bytes] = []
        self._in_report = False
        self._time, self._rank = "", -1

    def forward(self, pipe: int) -> None:
        """Pass on what comes through a pipe until its end, and close the pipe."""
        rest = b""
        while True:
            if not select.select([pipe], [], [], FLUSH_DELAY)[0]:
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
                self.process_line(line + b"\n")
            if rest.endswith(b"\r"):  # A progress bar draws the same line again and again.
                self.write(rest)
                rest = b""
        os.close(pipe)
        self.flush()
        self.write(rest)

    def process_line(self, line: bytes) -> None:
        """Show, hold back, evaluate or drop one line, which includes its line break."""
        if _HOROVOD_NOISE.match(line):
            return
        if found := _HOROVOD_FAILURE.match(line):
            code = int(found[2])
            # A shell adds 128 to the number of a signal.
            code = code if code < 128 else 128 - code
            # horovodrun lists the first failure first, while the last one is the root cause here.
            self.failures.insert(0, Failure(f"{time.monotonic():.0f}", int(found[1]), code))
            return
        line = _HOROVOD_TAG.sub(b"", line)
        if self._in_report:
            self._read_report(line)
        elif self._log_line.match(line):
            self._log.append(line)
        elif line.startswith(b"Traceback (most recent call last)"):
            self.flush()
            self._traceback = [line]
        elif self._traceback and line.startswith((b" ", b"\t")):
            self._traceback.append(line)
        elif self._traceback and line.startswith((_TORCH_REPORT, _HOROVOD_REPORT)):
            self._traceback = []
            self._in_report = True
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
        """Show the launcher's log, which may say why the launcher itself has failed."""
        self.write(b"".join(self._log))

    def write(self, text: bytes) -> None:
        """Write a text; a reader that has gone away does not end the training."""
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(self._out, text) :]

    def _read_report(self, line: bytes) -> None:
        """Read a line of the report, such as ``  rank      : 1 (local_rank: 1)``."""
        found = re.match(rb"\s+(time|rank|exitcode)\s*: (\S+)", line)
        if found is None:
            return
        key, value = found[1].decode(), found[2].decode()
        if key == "time":
            self._time = value
        elif key == "rank":
            self._rank = int(value)
        else:
            self.failures.append(Failure(self._time, self._rank, int(value)))


def root_cause(failures: Sequence[Failure]) -> Failure:
    """Return the failure that caused the others.

    The launcher checks its workers a few times a second, so it may take a worker whose connection
    broke for the first failure although another one was killed. Among the failures of the same
    second a signal comes first (except SIGTERM, which the launcher itself sends), then the exit
    codes that say more than "failed".

    Args:
        failures: The launcher's report.
    """
    last = failures[-1]

    def priority(failure: Failure) -> int:
        if failure.code < 0:
            return 0 if failure.code != -signal.SIGTERM else 3
        return 1 if failure.code in (BAD_INPUT, RUN_AGAIN) else 2

    same_second = [failure for failure in reversed(failures) if failure.time == last.time]
    return min(same_second, key=priority)
