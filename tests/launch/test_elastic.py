"""Horovod Elastic: workers are lost or come in, the run goes on from its newest checkpoint."""

import os
import signal
import subprocess

import pytest

from helpers.process import environment, wait_until, workers_below
from helpers.runs import COMMON, MODELS
from utils.checkpoint import format as checkpoint
from utils.files import ROOT

PRECISE = [*COMMON, *MODELS["alexnet"], "--dtype", "float64", "--epochs", "4"]


@pytest.fixture
def start():
    """Start the launcher with Horovod in the background; at the end of the test it is killed."""
    pytest.importorskip("horovod", reason="./setup.sh --horovod builds it")
    started = []
    yield lambda *words: started.append(launch(*words)) or started[-1]
    for process in started:
        process.kill()
        process.communicate()


def launch(folder, *options):
    command = [
        ROOT / "launcher.sh", "-m", "alexnet", "-d", "synthetic10", "-f", "horovod", *options,
        "--", *PRECISE, "-c", folder,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(word) for word in command], env=environment(), stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def check(process, train, folder, alone, sizes):
    """It has ended well, with these numbers of workers, and trained what one process trains."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("workers ")]
    assert shown == sizes
    result = train(alone, "alexnet", "serial", 1, "--dtype", "float64", "--epochs", "4")
    assert result.returncode == 0, result.stderr
    states = [checkpoint.load(f / checkpoint.LATEST)["state_dict"] for f in (folder, alone)]
    for name, tensor in states[0].items():
        assert (tensor - states[1][name]).abs().max() < 1e-9, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_worker_leaves_the_others_training(start, train, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "-n", "2", "--min-np", "1", "--hosts", "localhost:1,127.0.0.1:1")
    wait_until((folder / checkpoint.LATEST).exists, seconds=150)
    os.kill(workers_below(process.pid)[1], signal.SIGKILL)
    check(process, train, folder, tmp_path / "alone", ["2", "1"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_host_is_taken_in_after_a_save(start, train, tmp_path):
    folder, hosts, program = (tmp_path / name for name in ("run", "hosts", "dis cover"))
    hosts.write_text("localhost:1\n")
    program.write_text(f"#!/bin/sh\ncat '{hosts}'\n")
    program.chmod(0o755)
    elastic = ("--max-np", "2", "--host-discovery-script", program, "--network-interfaces", "lo")
    process = start(folder, "-n", "1", *elastic)
    wait_until((folder / checkpoint.LATEST).exists, seconds=150)
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    check(process, train, folder, tmp_path / "alone", ["1", "2"])
