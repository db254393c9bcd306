"""Starts a launcher and stays beside it: python supervise.py -- command ...

torch.distributed.launch answers every failure with exit code 1 and pages of text of its own, and
leaves its workers behind when it is killed. This small process, which imports nothing but the
standard library, passes on what the workers say, keeps the launcher's failure report to itself,
turns it into one line and an exit code, and leaves no process behind.

Exit codes: 0 finished, 2 bad input, 3 training failed, 130 and 143 ended by Ctrl-C and SIGTERM;
75 of a worker is passed on.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

PASSED_ON = (0, 2, 75)
FAILED = 3
# Seconds that workers get to end after SIGTERM before they are killed.
GRACE = 10.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

# The launcher's log lines begin with level, date and time, then the place in its source.
_LAUNCHER_LOG = re.compile(rb"[IWEF]\d{4} [\d:.]+ \d+ \S*torch/distributed/")
_REPORTS = (
    b"torch.distributed.elastic.multiprocessing.errors.ChildFailedError",
    b"torch.distributed.elastic.multiprocessing.api.SignalException",
)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux); call it in the child.

    The parent's thread that started this process must be its main thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Screen:
    """Passes standard error on, except what the launcher says about a failure.

    A traceback is held back until its last line tells whose it is.

    Attributes:
        exit_code, rank: of the worker that failed first, once the report has come.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self.out = out
        self.held: list[bytes] = []
        self.reporting = False
        self.rank: int | None = None
        self.exit_code: int | None = None

    def line(self, line: bytes) -> None:
        """Take one line, with its end."""
        if self.reporting:
            self._read_report(line)
        elif _LAUNCHER_LOG.match(line):
            return
        elif line.startswith(b"Traceback (most recent call last)"):
            self.flush()
            self.held = [line]
        elif self.held and line.startswith((b" ", b"\t")):
            self.held.append(line)
        elif self.held and line.startswith(_REPORTS):
            self.held = []
            self.reporting = line.startswith(_REPORTS[0])
        else:
            self.flush()
            self._write(line)

    def flush(self) -> None:
        """Show what has been held back."""
        for line in self.held:
            self._write(line)
        self.held = []

    def _write(self, line: bytes) -> None:
        self.out.write(line)
        self.out.flush()

    def _read_report(self, line: bytes) -> None:
        """Lines of the table such as ``rank : 1 (local_rank: 1)``; the root cause comes last."""
        if found := re.match(rb"\s+rank\s*: (\d+)", line):
            self.rank = int(found[1])
        elif found := re.match(rb"\s+exitcode\s*: (-?\d+)", line):
            self.exit_code = int(found[1])


def supervise(command: Sequence[str]) -> int:
    """Run a launcher to its end; returns the exit code."""
    if sys.platform == "linux":
        # Workers whose launcher is gone become children of this process and can be ended.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    received: list[int] = []
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=end_with_parent)

    def forward(number: int, _: object) -> None:
        received.append(number)
        # Ctrl-C reaches the launcher from the terminal too; a second one ends all at once.
        if number != signal.SIGINT:
            launcher.send_signal(number)
        elif received.count(signal.SIGINT) > 1:
            _signal_descendants(signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)

    screen = Screen(sys.stderr.buffer)
    assert launcher.stderr is not None
    reader = threading.Thread(target=_pass_on, args=(launcher.stderr, screen), daemon=True)
    reader.start()
    code = launcher.wait()
    _end_descendants()
    reader.join(timeout=5)
    screen.flush()
    return _exit_code(code, screen, received)


def _pass_on(pipe: IO[bytes], screen: Screen) -> None:
    for line in pipe:
        screen.line(line)


def _exit_code(code: int, screen: Screen, received: list[int]) -> int:
    if code == 0:
        return 0
    if received:
        return 128 + received[0]
    cause = code if screen.exit_code is None else screen.exit_code
    if cause in PASSED_ON:
        return cause
    who = "the launcher" if screen.rank is None else f"rank {screen.rank}"
    if cause < 0:
        how = f"was ended by signal {-cause} ({signal.Signals(-cause).name})"
    else:
        how = f"failed with exit code {cause}"
    print(f"error: {who} {how}; training has stopped", file=sys.stderr, flush=True)
    return FAILED


def _end_descendants() -> None:
    """End what is left after the launcher: SIGTERM first, SIGKILL after the grace."""
    deadline = time.monotonic() + GRACE
    number = signal.SIGTERM
    while _signal_descendants(number):
        time.sleep(0.1)
        _reap()
        if time.monotonic() > deadline:
            number = signal.SIGKILL


def _signal_descendants(number: int) -> bool:
    """Send a signal to every process that has come from this one; False if there is none."""
    processes = _descendants()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
    return bool(processes)


def _descendants() -> list[int]:
    """Living processes below this one, from /proc; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent ...; the name may hold anything, even parentheses
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, new = [], [os.getpid()]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def _reap() -> None:
    """Collect ended children that this process has inherited."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


if __name__ == "__main__":
    if sys.argv[1:2] != ["--"] or len(sys.argv) < 3:
        sys.exit("usage: python supervise.py -- command ...")
    sys.exit(supervise(sys.argv[2:]))
