"""Freed memory is kept for the next step: fewer page faults, the same training."""

import os
import resource

import pytest
from conftest import environment

from utils import allocator

FLAGS = [
    "-a", "alexnet", "-d", "synthetic10", "--train-size", "2560", "--test-size", "100",
    "--epochs", "1", "--lr", "0.01", "--memory-format", "contiguous",
]  # fmt: skip


def test_a_run_has_fewer_page_faults_and_the_same_numbers(run_script, tmp_path):
    faults, logs = {}, {}
    for name, changes in (("keeps", {}), ("gives back", {"MALLOC_TRIM_THRESHOLD_": "131072"})):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        result = run_script([*FLAGS, "-c", str(tmp_path / name)], env=environment(**changes))
        assert result.returncode == 0, result.stderr
        faults[name] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before
        logs[name] = (tmp_path / name / "log.txt").read_bytes()
    assert logs["keeps"] == logs["gives back"]
    # Twenty steps whose tensors take more than 8 MB, which are 2,000 pages.
    assert faults["gives back"] - faults["keeps"] > 20 * 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=10")],
)
def test_the_users_choice_stands(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="glibc is Linux's C library")
def test_glibc_takes_the_settings():
    assert allocator.keep_freed_memory()
