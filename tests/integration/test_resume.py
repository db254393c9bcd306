"""A run that is killed and resumed is the run that nobody touched, bit for bit."""

import random
import re
from functools import partial

import pytest

from helpers.process import environment
from helpers.runs import COMMON, MODELS, same
from tools import verify
from tools.commands import engine_command
from tools.fault_injection import MISTAKES
from utils.checkpoint import format as checkpoint
from utils.checkpoint.resume import LoadedCheckpoint
from utils.checkpoint.train_state import TrainState
from utils.config.args import parse_args
from utils.errors import UserError
from utils.files import ROOT

STEPS = 2 * 7  # 197 images in batches of 32, two epochs
FAST = [
    ("alexnet", "dist", 2, 5),
    ("wrn with dropout", "serial", 1, 10),
    ("resnet", "horovod", 3, 9),
    ("resnet", "serial", 1, 1),  # before the first save
]


def random_cases() -> list[tuple[str, str, int, int]]:
    """Twenty kill points from a seeded generator, over all models and engines."""
    draw = random.Random(2024)
    cases = []
    for i in range(20):
        engine = ("serial", "dist", "horovod")[i % 3]
        workers = 1 if engine == "serial" else draw.choice((1, 2))
        cases.append((draw.choice(list(MODELS)), engine, workers, draw.randrange(STEPS)))
    return cases


def check(train, tmp_path, model, engine, workers, kill_at):
    untouched, killed = tmp_path / "untouched", tmp_path / "killed"
    result = train(untouched, model, engine, workers)
    assert result.returncode == 0, result.stderr
    assert train(killed, model, engine, workers, fault=f"kill-{kill_at}").returncode != 0
    result = train(killed, model, engine, workers, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    same(untouched, killed)


@pytest.mark.parametrize(("model", "engine", "workers", "kill_at"), FAST)
def test_killed_and_resumed_equals_untouched(train, tmp_path, model, engine, workers, kill_at):
    check(train, tmp_path, model, engine, workers, kill_at)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("model", "engine", "workers", "kill_at"), random_cases())
def test_killed_anywhere_and_resumed(train, tmp_path, model, engine, workers, kill_at):
    check(train, tmp_path, model, engine, workers, kill_at)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("dist", 3), ("horovod", 2)),
        pytest.param(("horovod", 2), ("dist", 3), marks=pytest.mark.slow),
        pytest.param(("serial", 1), ("dist", 3), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_inside_an_epoch_with_other_workers_of_another_engine(
    train, tmp_path, first, then
):
    """Killed after five steps of seven; the rest of the epoch is trained once, as by one."""
    precise = ("--dtype", "float64")
    alone, folder = tmp_path / "alone", tmp_path / "relay"
    assert train(alone, "alexnet", "serial", 1, *precise).returncode == 0
    assert train(folder, "alexnet", *first, *precise, fault="kill-5").returncode != 0
    result = train(folder, "alexnet", *then, *precise, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "after epoch 0, step 3" in result.stdout
    assert f"{first[1]} worker(s) have trained so far, now {then[1]}" in result.stdout
    weights = [checkpoint.load(f / checkpoint.LATEST)["state_dict"] for f in (alone, folder)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-9, name


def test_replicas_that_come_apart_are_noticed(run, tmp_path):
    """The last bit of one value on one worker: rank and tensor are named."""
    words = engine_command("dist", 2, str(ROOT / "tools" / "fault_injection.py"), "flip-2", "cifar")
    result = run(
        [*words, *COMMON, *MODELS["alexnet"], "-c", tmp_path / "r", "--check-replicas", "4"]
    )
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "rank 1" in line
    assert "classifier.bias" in line


def test_a_checkpoint_inside_an_epoch_belongs_to_its_batch(tmp_path):
    state = {"epoch": 0, "step": 3, "shape": {"global batch": 32, "seed": 0}}
    train = parse_args(["--epochs", "2"]).train
    loaded = LoadedCheckpoint(tmp_path / "file", state)
    assert TrainState.start(train, loaded, {"global batch": 32, "seed": 0}).step == 3
    with pytest.raises(UserError, match="global batch 32, not 16"):
        TrainState.start(train, loaded, {"global batch": 16, "seed": 0})


def test_a_proof_of_resuming_resumes(monkeypatch, tmp_path, capsys):
    """It does not hold where the run was killed too early, or not at all."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
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
