"""The processes below this one, as /proc shows them; none where there is no /proc."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

# Seconds that processes get to end after SIGTERM, and then after SIGKILL.
TERM_TIMEOUT, KILL_TIMEOUT = 2.0, 20.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# States of processes that run no longer: gone, a zombie, dead.
_ENDED = ("", "Z", "X")


def end_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Let the kernel signal this process when its parent ends (Linux).

    The child calls it. The thread that started the child must be the main thread of its process,
    because the kernel sends the signal when that thread ends.

    Args:
        number: The signal to receive.
        parent: The id of the parent, where it is known; if it has ended already, so does the child.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def inherit_orphans() -> None:
    """Let processes below this one whose parent ends become its children (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or a zombie that its parent has not collected yet."""
    return _state_and_parent(pid)[0] in _ENDED


def is_stopped(pid: int) -> bool:
    """Return whether a signal or a debugger has stopped a process."""
    return _state_and_parent(pid)[0] in ("T", "t")


def identity(pid: int) -> str:
    """Return what tells a process from all others of this machine: boot, id and time of its start.

    Args:
        pid: The id of the process.

    Returns:
        A text, empty for no process and where there is no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return f"{boot} {pid} {stat.rpartition(')')[2].split()[19]}"


def giver_of_variables(prefix: str) -> int:
    """Return the id of the process that has given this one its variables of a prefix.

    That is the closest one above that was itself started without them, or with others: a script
    in between, which hands them on, is passed over.

    Args:
        prefix: The beginning of the variables' names.
    """
    variables = os.environb.items()
    given = {b"%s=%s" % item for item in variables if item[0].startswith(prefix.encode())}
    pid = os.getppid()
    while pid and given <= _environment(pid):
        pid = _state_and_parent(pid)[1]
    return pid


def descendants() -> list[int]:
    """Return the ids of the living processes below this one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        state, parent = _state_and_parent(pid)
        if state not in _ENDED:
            children.setdefault(parent, []).append(pid)
    found, new = [], [os.getpid()]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def send_signal(pids: list[int], number: int) -> None:
    """Send a signal to each of the processes that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_descendants() -> list[int]:
    """End every process below this one, with SIGTERM first and with SIGKILL after a timeout.

    Returns:
        The ids of processes that cannot be ended, such as one inside a driver that hangs.
    """
    start = time.monotonic()
    while remaining := descendants():
        waited = time.monotonic() - start
        if waited > TERM_TIMEOUT + KILL_TIMEOUT:
            return remaining
        send_signal(remaining, signal.SIGTERM if waited < TERM_TIMEOUT else signal.SIGKILL)
        time.sleep(0.05)
        _collect_zombies()
    _collect_zombies()
    return []


def describe_signal(number: int) -> str:
    """Return the number and the name of a signal, such as ``signal 9 (SIGKILL)``."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Return the state letter of proc(5), empty for no process, and the id of the parent."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", 0
    # The line is "pid (name) state parent ...", and the name may itself hold parentheses.
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _environment(pid: int) -> set[bytes]:
    """Return the variables with which a process was started; none where they cannot be read."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _collect_zombies() -> None:
    """Collect the ended children of this process, inherited ones included."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
