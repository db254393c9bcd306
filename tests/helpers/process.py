"""Processes that tests start: in a quiet environment, with a time limit, and none is left."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tools.commands import clean_environment
from utils.files import ROOT

# In the environment of every process that the tests start, however deep.
MARK = {"CIFAR_TESTS": str(os.getpid())}


def environment(**changes) -> dict[str, str]:
    """The environment of the tests' processes: one thread, no GPU, nothing inherited."""
    quiet = {**MARK, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}
    return clean_environment(**quiet)


def run(command, *, env=None, cwd=ROOT, timeout=100) -> subprocess.CompletedProcess:
    """Run a command after setsid; at the time limit all of it is killed."""
    before = marked_processes()
    process = subprocess.Popen(
        [str(word) for word in command],
        env=env or environment(),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(marked_processes() - before)
        out, err = process.communicate()
        pytest.fail(f"hangs for {timeout} s: {command}\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def marked_processes() -> set[int]:
    """Living processes that the tests have started, orphans included."""
    mark = "=".join(*MARK.items()).encode()
    found = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes().split(b"\0"):
                found.add(int(environ.parent.name))
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def wait_until(condition, seconds=10) -> None:
    """Wait for a condition to come about; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "has not come about in time"
        time.sleep(0.02)


def kill(processes) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def workers_below(process: int) -> dict[int, int]:
    """The training processes below a process, by rank."""
    found = {}
    for child in _below(process):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if not any(word.endswith(b".py") and b"cifar" in word for word in command[:4]):
                continue
            words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            names = dict(word.split(b"=", 1) for word in words if b"=" in word)
            rank = names.get(b"RANK", names.get(b"HOROVOD_RANK"))
            if rank is not None:
                found[int(rank)] = child
    return found


def children_of(process: int) -> list[int]:
    """The children of a process."""
    words: list[str] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):  # any thread may start one
        with contextlib.suppress(OSError):
            words += path.read_text().split()
    return [int(word) for word in words]


def _below(process: int) -> list[int]:
    children = children_of(process)
    return [*children, *(below for child in children for below in _below(child))]
