"""--verify: what it proves, what it would notice, and what a machine is too small for."""

import re
from functools import partial

import pytest

from helpers.process import environment
from helpers.runs import same
from helpers.warm import run_warm
from tools import verify
from tools.fault_injection import MISTAKES
from utils.files import ROOT


def test_a_proof_of_resuming_resumes(monkeypatch, tmp_path, capsys):
    """It does not hold where the run was killed too early, or not at all."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        verify.subprocess, "run", lambda words, env, cwd, **_: run_warm(words[1:], env=env, cwd=cwd)
    )
    runner = verify.Runner(tmp_path, "none", False)
    one = verify.Group()
    untouched = runner.reference(verify.ALEXNET)
    for kill_at, words in (
        (0, "not been killed after a save"),
        (99, "has been trained for 2 epochs"),
        (3, "differs by 0.0e+00"),
    ):
        killed = runner.killed(verify.ALEXNET, one, 1, kill_at)
        check = verify.Checks()
        check("resumed", 0.0, untouched, partial(runner.resumed, killed, verify.ALEXNET, one, 1))
        assert check.caught == ([] if kill_at == 3 else ["resumed"])
        assert words in capsys.readouterr().out


def test_the_planted_mistakes_still_fit_the_code(train, tmp_path):
    """All of them in one run, which must differ and not crash."""
    result = train(tmp_path / "all", "alexnet", "dist", 2, fault="+".join(MISTAKES))
    assert result.returncode == 0, result.stderr
    assert train(tmp_path / "none", "alexnet", "dist", 2).returncode == 0
    with pytest.raises(AssertionError):
        same(tmp_path / "all", tmp_path / "none")


@pytest.mark.parametrize(
    ("gpus", "horovod", "groups", "words"),
    [
        (0, True, [("dist", 3), ("horovod", 3)], ""),
        (0, False, [("dist", 3)], "not installed"),
        (1, True, [("dist", 3)], "NCCL between GPUs"),
        (2, True, [("dist", 2), ("horovod", 2)], "three workers"),
        (2, False, [("dist", 2)], "three workers.*not installed"),
        (8, True, [("dist", 3), ("horovod", 3)], ""),
    ],
)
def test_what_a_machine_is_too_small_for_is_named(gpus, horovod, groups, words):
    found, left_out = verify.groups_of(gpus, horovod)
    assert [(group.engine, group.most) for group in found] == groups
    assert re.search(words, " ".join(left_out))
    assert bool(words) == bool(left_out)
    assert ("CIFAR_SHARE_GPU" in found[0].settings) == (gpus == 1)  # NCCL would refuse it


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("gpus", "mistake", "checks"), [(1, "none", 11), (1, "own-mean", 11), (2, "none", 12)]
)
def test_the_proof_on_gpus_in_small(monkeypatch, tmp_path, capsys, gpus, mistake, checks):
    """On the CPU, where a stand-in records and replays what a graph would."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    program = (str(ROOT / "tests" / "helpers" / "recorders.py"), "replayer")
    caught = verify.verify(verify.Runner(tmp_path, mistake, True, program), gpus)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:4] in ("ok  ", "FAIL")]
    assert len(lines) == checks, lines
    assert len(caught) == sum(line.startswith("FAIL") for line in lines)
    assert bool(caught) == (mistake != "none"), lines
    assert sum("graph" in line for line in lines) == 5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mistake", ["none", *MISTAKES])
def test_verify_notices_every_planted_mistake(run, mistake):
    command = [ROOT / "launcher.sh", "--verify"]
    command += [] if mistake == "none" else ["--", "--plant", mistake]
    result = run(command, timeout=580)
    assert result.returncode == (0 if mistake == "none" else 1), result.stdout + result.stderr
    assert ("FAIL" in result.stdout) == (mistake != "none")
    found = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    shown = ("differs by", "the replicas have come apart")
    assert all(any(words in line for words in shown) for line in found), result.stdout
