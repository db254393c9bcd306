"""Fixtures that start the real scripts, as users do, on every engine."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"serial": "cifar.py", "dist": "cifar.py", "horovod": "cifar_horovod.py"}
# What an outer launcher may have left; the tests' own launchers set it anew.
INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**changes) -> dict[str, str]:
    """The environment of the tests' processes: one thread, no GPU, nothing inherited."""
    clean = {name: value for name, value in os.environ.items() if name not in INHERITED}
    return {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def run(command, *, env=None, cwd=ROOT, timeout=100) -> subprocess.CompletedProcess:
    """Run a command in a session of its own; at the time limit all of it is killed."""
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
        kill_session(process.pid)
        out, err = process.communicate()
        pytest.fail(f"hangs for {timeout} s: {command}\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_session(leader: int) -> None:
    """Kill a process group and the workers that launchers put into sessions of their own."""
    for pid in [leader, *descendants(leader)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(leader: int) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()[1:]]
    found, new = [], [leader]
    while new:
        new = [pid for pid, parent in pairs if parent in new]
        found += new
    return found


def engine_command(engine: str, workers: int, script: Path) -> list[str]:
    """How a user starts a script with an engine."""
    if engine == "serial":
        return [sys.executable, str(script)]
    if engine == "dist":
        return [
            sys.executable, "-W", "ignore::FutureWarning", "-m", "torch.distributed.launch",
            f"--nproc_per_node={workers}", "--master_addr=127.0.0.1",
            f"--master_port={free_port()}", str(script),
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
    left = descendants(os.getpid())
    commands = subprocess.run(
        ["ps", "-o", "pid=,args=", "-p", ",".join(map(str, left)) or "0"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    assert "cifar" not in commands, commands


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
