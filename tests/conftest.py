"""Fixtures that start the real scripts, as users do, on every engine."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from archives import small_cifar10

from tools.commands import SCRIPTS, clean_environment, engine_command, has_horovod
from utils.files import ROOT

torch.set_num_threads(1)  # other tests run beside this process

# Ignored under nohup and in the background of a script, and what is ignored is inherited.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

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
def cifar10(tmp_path):
    """A small archive in the official layout, and its md5."""
    path = tmp_path / "small.tar.gz"
    return path, small_cifar10(path)


@pytest.fixture
def run_script():
    """Start cifar.py: alone, or with several workers under torch.distributed.launch."""

    def start(arguments, workers=None, **options):
        engine = "serial" if workers is None else "dist"
        command = engine_command(engine, workers or 1, str(ROOT / "cifar.py"))
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
        if engine == "horovod" and not has_horovod():
            pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
        words = [script, SCRIPTS[engine].removesuffix(".py")] if script else [SCRIPTS[engine]]
        command = engine_command(engine, workers, str(ROOT / words[0]), *words[1:])
        return run([*command, *arguments], **options)

    return start


# Runs of a few seconds that tests interrupt: 197 images in batches of 32, two epochs of 7 steps.
COMMON = [
    "-d", "synthetic10", "--train-size", "197", "--test-size", "50", "--train-batch", "32",
    "--epochs", "2", "--schedule", "1", "--lr", "0.02", "--save-every", "3",
]  # fmt: skip
MODELS = {
    "alexnet": ["-a", "alexnet"],
    "resnet": ["-a", "resnet", "--depth", "8"],
    "wrn with dropout": ["-a", "wrn", "--depth", "10", "--widen-factor", "1", "--drop", "0.3"],
}


@pytest.fixture
def train():
    """Run the script of an engine in a folder as the launcher does, with a fault planted or not."""

    def start(folder, model, engine, workers, *more, fault="none", restarts=0):
        if engine == "horovod":
            pytest.importorskip("horovod", reason="./setup.sh --horovod builds it")
        script = SCRIPTS[engine].removesuffix(".py")
        words = engine_command(
            engine, workers, str(ROOT / "tools" / "fault_injection.py"), fault, script
        )
        if engine != "serial":
            tagged = ["--tagged"] if engine == "horovod" else []
            supervise = [sys.executable, str(ROOT / "utils" / "launch" / "supervisor.py"), *tagged]
            words = [*supervise, "--max-restarts", str(restarts), "--", *words]
        return run([*words, *COMMON, *MODELS[model], "-c", folder, *more])

    return start
