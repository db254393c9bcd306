"""Freed memory is retained for the next step: fewer page faults, the same training."""

import os
import resource
import sys

import pytest

from helpers.process import environment
from utils.files import ROOT
from utils.runtime import malloc

FLAGS = [
    "-a", "resnet", "--depth", "8", "-d", "synthetic10", "--train-size", "640", "--epochs", "1",
    "--test-size", "100", "--lr", "0.01", "--memory-format", "contiguous",
]  # fmt: skip
PLAIN = {"GLIBC_TUNABLES": "glibc.malloc.arena_test=8"}  # glibc's own default


def test_a_run_has_fewer_page_faults_and_the_same_numbers(run, tmp_path):
    faults, logs = {}, {}
    for name, changes in (("keeps", {}), ("gives back", PLAIN)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        command = [sys.executable, ROOT / "cifar.py", *FLAGS, "-c", tmp_path / name]
        result = run(command, env=environment(**changes))
        assert result.returncode == 0, result.stderr
        faults[name] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before
        logs[name] = (tmp_path / name / "log.txt").read_bytes()
    assert logs["keeps"] == logs["gives back"]
    # Imports cost 170,000. Five steps whose activations take 80 MB, which are 20,000 pages each,
    # cost nothing more, or 30,000 to 110,000: that depends on what else is at the end of the heap.
    assert faults["gives back"] - faults["keeps"] > 10_000, faults


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=10")],
)
def test_the_users_choice_stands(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert not malloc.retain_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert not malloc.retain_freed_memory()


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="glibc is Linux's C library")
def test_glibc_takes_the_settings():
    assert malloc.retain_freed_memory()
