"""Starts a launcher and stays beside it: python supervise.py [--tagged] -- command ...

torch.distributed.launch answers every failure with exit code 1 and pages of text of its own, and
leaves its workers behind when it is killed. This small process, which imports nothing but the
standard library, passes on what the workers say, keeps the launcher's failure report to itself,
turns it into one line and an exit code, and leaves no process behind. With --tagged the launcher
is horovodrun, which puts a tag before every line of its workers and pipes their standard output
too; rank 0 then finds the terminal, if there is one, under CIFAR_TERMINAL.

Exit codes: 0 finished, 2 bad input, 3 training failed, 130 and 143 ended by Ctrl-C and SIGTERM;
75 of a worker is passed on.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BAD_INPUT, FAILED, RUN_AGAIN = 2, 3, 75
STDOUT, STDERR = 1, 2

# Seconds after which silence means that what has come of a line or a traceback is all of it.
IDLE = 0.2
# Seconds between two signals that make the second one a repetition and not an echo of the first.
ECHO = 0.5
# Seconds that a launcher gets to end after a signal; torch's gives its workers 30 of them.
PATIENCE = 40
# Seconds that workers whose launcher is gone get to end after SIGTERM.
GRACE = 2.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_REPORT = b"torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
_TAG = re.compile(rb"\[\d+\]<std(out|err)>:")
# What horovodrun says of itself.
_TAGGED_REPORT = b"RuntimeError: Horovod detected that one or more processes exited"
_TAGGED_FAILURE = re.compile(rb"Process (\d+) exit with status code (\d+)\.")
_TAGGED_NOISE = re.compile(rb"Terminating remaining workers after|\[\d+\]<stderr>:Terminated$")
_ENDED_BY_SIGNAL = (
    b"torch.distributed.elastic.multiprocessing.api.SignalException",
    b"KeyboardInterrupt",
)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel signal this process when its parent ends (Linux); call it in the child.

    The parent's thread that started this process must be its main thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _begin_launcher() -> None:
    # SIGTERM lets the launcher end its workers when this process is killed.
    end_with_parent(signal.SIGTERM)


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
        """Pass on what comes through a pipe until its end."""
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
        self.flush()
        self.write(rest)

    def line(self, line: bytes) -> None:
        """Take one line, with its end."""
        if _TAGGED_NOISE.match(line):
            return
        if found := _TAGGED_FAILURE.match(line):
            code = int(found[2])
            # The first to end comes first here; a shell adds 128 to a signal.
            worker = Failure("", int(found[1]), code if code < 128 else 128 - code)
            self.failures.insert(0, worker)
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


def supervise(command: Sequence[str], tagged: bool = False) -> int:
    """Run a launcher, horovodrun if tagged, to its end; returns the exit code."""
    if sys.platform == "linux":
        # Workers whose launcher is gone become children of this process and can be ended.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    reading, writing = os.pipe()
    reading_out, writing_out = os.pipe() if tagged else (None, None)
    environment = dict(os.environ)
    if tagged and os.isatty(STDOUT):
        environment["CIFAR_TERMINAL"] = os.ttyname(STDOUT)
    try:
        # In a session of its own: what the terminal sends comes here once and is passed on once.
        launcher = subprocess.Popen(
            command,
            stdout=writing_out,
            stderr=writing,
            env=environment,
            start_new_session=True,
            preexec_fn=_begin_launcher,
        )
    except OSError as error:
        print(f"error: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    os.close(writing)
    screen = Screen(STDERR, launcher.pid)
    streams = [(screen, reading)]
    if reading_out is not None and writing_out is not None:
        os.close(writing_out)
        output = Screen(STDOUT, launcher.pid)
        output.failures = screen.failures  # horovodrun reports on standard output
        streams.append((output, reading_out))
    received = _forward_signals(launcher, screen)
    readers = [threading.Thread(target=s.copy, args=(pipe,), daemon=True) for s, pipe in streams]
    for reader in readers:
        reader.start()
    code = launcher.wait()
    _end_descendants()
    for reader in readers:
        reader.join(timeout=5)
    return _exit_code(code, screen, received)


def _forward_signals(launcher: subprocess.Popen[bytes], screen: Screen) -> list[int]:
    """Pass signals on to the launcher; a second one, or no end after the first, kills all.

    Returns:
        The signals that come, in order.
    """
    received: list[int] = []
    first = 0.0

    def forward(number: int, _: object) -> None:
        nonlocal first
        received.append(number)
        if len(received) == 1:
            first = time.monotonic()
            screen.interrupted = True
            launcher.send_signal(number)
            signal.alarm(PATIENCE)
        elif time.monotonic() - first > ECHO:
            _signal_descendants(signal.SIGKILL)

    signal.signal(signal.SIGALRM, lambda *_: _signal_descendants(signal.SIGKILL) and None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup, for one
            signal.signal(number, forward)
    return received


def _exit_code(code: int, screen: Screen, received: list[int]) -> int:
    if code == 0:
        return 0
    if received:
        return 128 + received[0]
    if screen.failures:
        _, rank, code = root_cause(screen.failures)
        who = f"rank {rank}"
    else:
        screen.show_log()
        who = "the launcher"
    if code in (BAD_INPUT, FAILED, RUN_AGAIN):
        return code  # the worker has said why
    how = f"failed with exit code {code}" if code > 0 else f"was ended by {_name(-code)}"
    screen.write(f"error: {who} {how}; training has stopped\n".encode())
    return FAILED


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _end_descendants() -> None:
    """End what is left after the launcher: SIGTERM first, SIGKILL after the grace."""
    deadline = time.monotonic() + GRACE
    number = signal.SIGTERM
    while _signal_descendants(number):
        time.sleep(0.05)
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
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
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
    tagged = sys.argv[1:2] == ["--tagged"]
    words = sys.argv[1 + tagged :]
    if words[:1] != ["--"] or len(words) < 2:
        sys.exit("usage: python supervise.py [--tagged] -- command ...")
    sys.exit(supervise(words[1:], tagged))
