"""Scripts in processes that have imported torch already.

Most of a start is importing torch. Where a test is about training, and not about how a process
starts, its workers are forked from one server that has imported everything. The script, its
arguments and the engine are the real ones. What is not: variables that Python or torch read when
they start (OMP_*, PYTHON*), sys.path, the interpreter's shutdown, the launcher and the supervisor.
tests/launch, and those tests that call ``run`` or ``launch``, start scripts as users do.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver, resource_tracker
from unittest import mock

import pytest

from helpers.process import environment, free_port, kill, marked_processes
from utils.files import ROOT

_PRELOAD = [
    "pytest", "torch", "torch._dynamo", "torch.distributed", "matplotlib.pyplot", "cifar",
    "helpers.warm", "tools.fault_injection", "utils.distributed.ddp", "utils.runtime.exit_codes",
]  # fmt: skip


def run_warm(words, workers=1, *, env=None, cwd=ROOT, timeout=100) -> subprocess.CompletedProcess:
    """Run a Python script with its arguments, and return what it has said and its exit code.

    Several workers meet as under srun, by variables of the environment. When one has failed, the
    others are ended, as torch.distributed.launch does, and its exit code is that of the job.

    Args:
        words: The path of the script and its arguments, or -m, a module and its arguments.
        workers: The number of workers; one is started as without a launcher.
        env: The environment.
        cwd: The current folder.
        timeout: Seconds after which all is killed and the test fails.
    """
    words = [str(word) for word in words]
    server = _server()
    before = marked_processes()
    out, err = _Stream(server), _Stream(server)
    started = [
        server.Process(
            target=_become,
            args=(words, {**(env or environment()), **place}, cwd, out.end, err.end),
        )
        for place in _places(workers)
    ]
    try:
        for process in started:
            process.start()
        code = _wait(started, time.monotonic() + timeout)
        left = _left(before) if code == 0 else set()
    finally:
        kill(marked_processes() - before - server_processes())
        out.end.close()
        err.end.close()
    assert not left, f"a run that has ended well has left processes: {left}"
    texts = out.text(), err.text()
    if code is None:
        pytest.fail(f"hangs for {timeout} s: {words}\n{texts[0][-2000:]}\n{texts[1][-2000:]}")
    return subprocess.CompletedProcess(words, code, *texts)


def _left(before: set[int]) -> set[int]:
    """Return the processes that have come since and do not end within a second."""
    deadline = time.monotonic() + 1
    while left := marked_processes() - before - server_processes():
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return set()


class _Stream:
    """A pipe from the workers, which a thread reads to its end.

    Attributes:
        end: The end that the workers write to.
    """

    def __init__(self, server) -> None:
        self._reading, self.end = server.Pipe(duplex=False)
        self._parts = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while part := os.read(self._reading.fileno(), 1 << 16):
            self._parts.append(part)

    def text(self) -> str:
        """Return what has come, once every process that could write has ended."""
        self._thread.join(5)
        assert not self._thread.is_alive(), "a process that nobody waits for still writes"
        self._reading.close()
        return b"".join(self._parts).decode(errors="replace")


def server_processes() -> set[int]:
    """Return the ids of the server's own processes, none where it has not been started."""
    ids = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid
    return {process for process in ids if process}


def stop_server() -> None:
    """End the server, if it has been started. It waits for every process that has come of it."""
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


def _server():
    """The context whose processes are forked from the server, which starts at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with mock.patch.dict(os.environ, environment(PYTHONPATH=paths), clear=True):
        forkserver.ensure_running()
    return context


def _places(workers):
    """The variables that tell each of several workers its rank, and where they meet."""
    if workers == 1:
        return [{}]
    port = free_port()  # Another process could take it before rank 0 does.
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }
        for rank in range(workers)
    ]  # fmt: skip


def _become(words, env, cwd, out, err) -> None:
    """Be the script, after setsid; its standard streams go to the pipes."""
    assert {"cifar", "torch._dynamo"} <= set(sys.modules), "nothing has been imported before"
    assert len(os.listdir("/proc/self/task")) == 1, "forked from a process with threads"
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # The script's own processes are no matter.
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except KeyboardInterrupt:  # Python itself ends by the signal then.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _wait(started, deadline) -> int | None:
    """Wait for the workers; return the exit code of the first that fails, None when it is late."""
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in started]
        failed = [code for code in codes if code]
        if failed:
            for process in started:
                process.terminate()
                process.join(5)
                process.kill()
                process.join()
            return failed[0]
        if None not in codes:
            return 0
        alive = [process.sentinel for process in started if process.exitcode is None]
        multiprocessing.connection.wait(alive, timeout=0.5)
    return None
