"""Fixtures that start the real scripts, as users do, on every engine."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"serial": "cifar.py", "dist": "cifar.py", "horovod": "cifar_horovod.py"}
# What an outer launcher may have left; the tests' own launchers set it anew.
INHERITED = re.compile("(LOCAL_)?(RANK|WORLD_SIZE)|(MASTER|PET|TORCHELASTIC|HOROVOD)_.*")
# In the environment of every process that the tests start, however deep.
MARK = {"CIFAR_TESTS": str(os.getpid())}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**changes) -> dict[str, str]:
    """The environment of the tests' processes: one thread, no GPU, nothing inherited."""
    clean = {name: value for name, value in os.environ.items() if not INHERITED.fullmatch(name)}
    return {**clean, **MARK, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def run(command, *, env=None, cwd=ROOT, timeout=100) -> subprocess.CompletedProcess:
    """Run a command in a session of its own; at the time limit all of it is killed."""
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


def kill(processes) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def engine_command(engine: str, workers: int, script: Path) -> list[str]:
    """How a user starts a script with an engine."""
    if engine == "serial":
        return [sys.executable, str(script)]
    if engine == "dist":
        return [
            sys.executable, "-W", "ignore::FutureWarning", "-m", "torch.distributed.launch",
            f"--nproc_per_node={workers}", "--master_addr=127.0.0.1",
            f"--master_port={free_port()}", "--log-dir=/dev/null", str(script),
        ]  # fmt: skip
    horovodrun = shutil.which("horovodrun", path=str(Path(sys.executable).parent))
    if importlib.util.find_spec("horovod") is None or horovodrun is None:
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    return [
        horovodrun, "-np", str(workers), "-H", f"localhost:{workers}", "--gloo",
        sys.executable, str(script),
    ]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """At the end nothing that a test started is alive."""
    yield
    deadline = time.monotonic() + 5
    while (left := marked_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    commands = [Path(f"/proc/{process}/cmdline").read_bytes() for process in left]
    kill(left)
    assert commands == []


@pytest.fixture(name="run")
def run_fixture():
    """Run any command with a time limit, in the tests' environment."""
    return run


@pytest.fixture
def run_script():
    """Start cifar.py: alone, or with several workers under torch.distributed.launch."""

    def start(arguments, workers=None, **options):
        engine = "serial" if workers is None else "dist"
        command = engine_command(engine, workers or 1, ROOT / "cifar.py")
        return run([*command, *arguments], **options)

    return start


@pytest.fixture(params=["serial", "dist", "horovod"])
def engine(request):
    """Every engine in turn."""
    return request.param


@pytest.fixture
def launch(engine):
    """Start a script with the engine of this turn; the training script unless another is named."""

    def start(arguments, workers=2, script=None, **options):
        path = ROOT / (script or SCRIPTS[engine])
        command = engine_command(engine, workers, path)
        if script:
            command.append(SCRIPTS[engine].removesuffix(".py"))
        return run([*command, *arguments], **options)

    return start
