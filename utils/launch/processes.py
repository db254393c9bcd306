"""The processes below this one, as /proc shows them; none where there is no /proc."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

# Seconds that processes get to end after SIGTERM, and after SIGKILL.
GRACE, LAST = 2.0, 20.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel signal this process when its parent ends (Linux); call it in the child.

    The parent's thread that started this process must be its main thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def inherit_orphans() -> None:
    """Let processes below this one whose parent ends become its children (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def state(process: int) -> str:
    """The letter of proc(5): R, S, T (stopped), Z (ended), ...; empty where there is none."""
    return _stat(process)[0]


def has_ended(process: int) -> bool:
    """Whether a process is gone, or only waits for its parent to take notice."""
    return state(process) in ("", "Z", "X")


def descendants() -> list[int]:
    """The living processes below this one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        process = int(folder.name)
        letter, parent = _stat(process)
        if letter not in ("", "Z", "X"):
            children.setdefault(parent, []).append(process)
    found, new = [], [os.getpid()]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def send(processes: list[int], number: int) -> None:
    """Send a signal to each of the processes that are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def end_descendants() -> list[int]:
    """End every process below this one: SIGTERM first, SIGKILL after the grace.

    Returns:
        Those that cannot be ended, such as one inside a driver that hangs.
    """
    begin = time.monotonic()
    while left := descendants():
        waited = time.monotonic() - begin
        if waited > GRACE + LAST:
            return left
        send(left, signal.SIGTERM if waited < GRACE else signal.SIGKILL)
        time.sleep(0.05)
        _reap()
    _reap()
    return []


def name_of(number: int) -> str:
    """A signal in words."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _stat(process: int) -> tuple[str, int]:
    """State and parent of a process."""
    try:
        # pid (name) state parent ...; the name may hold anything, even parentheses
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return "", 0
    letter, parent = text.rpartition(")")[2].split()[:2]
    return letter, int(parent)


def _reap() -> None:
    """Collect ended children that this process has inherited."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
