"""Fixtures that start the real scripts, as users do, on every engine."""

import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.archives import small_cifar10
from helpers.process import kill, marked_processes, run
from helpers.runs import COMMON, MODELS
from helpers.warm import run_warm, server_processes, stop_server
from tools.commands import SCRIPTS, engine_command
from utils.files import ROOT
from utils.launch.commands import has_horovod

torch.set_num_threads(1)  # other tests run beside this process

# Ignored under nohup and in the background of a script, and what is ignored is inherited.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """At the end nothing that a test started is alive."""
    yield
    deadline = time.monotonic() + 5
    while (left := marked_processes() - server_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    commands = [Path(f"/proc/{process}/cmdline").read_bytes() for process in left]
    kill(left)
    stop_server()
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
    """Run cifar.py, with one worker or with several; helpers/warm.py says how they start."""

    def start(arguments, workers=1, **options):
        return run_warm([ROOT / "cifar.py", *arguments], workers, **options)

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


@pytest.fixture
def train():
    """Run the script of an engine in a folder, with a fault planted or not.

    With restarts, and with Horovod, it is started as the launcher does.
    """

    def start(folder, model, engine, workers, *more, fault="none", restarts=None):
        if engine == "horovod":
            pytest.importorskip("horovod", reason="./setup.sh --horovod builds it")
        script = [str(ROOT / "tools" / "fault_injection.py"), fault]
        flags = [*COMMON, *MODELS[model], "-c", folder, *more]
        if restarts is None and engine != "horovod":
            return run_warm([*script, "cifar", *flags], workers)
        words = engine_command(engine, workers, *script, SCRIPTS[engine].removesuffix(".py"))
        tagged = ["--tagged"] if engine == "horovod" else []
        supervise = [sys.executable, str(ROOT / "utils" / "launch" / "supervisor.py"), *tagged]
        return run([*supervise, "--max-restarts", str(restarts or 0), "--", *words, *flags])

    return start
