"""A run that is killed and resumed is the run that nobody touched, bit for bit."""

import json
import random
import shutil

import pytest

from helpers.runs import COMMON, MODELS, same
from tools.commands import engine_command
from utils.checkpoint import format as checkpoint
from utils.checkpoint import manager
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
    ("first", "then", "changed"),
    [
        (("dist", 3), ("horovod", 2), ()),
        pytest.param(
            ("horovod", 2),
            ("dist", 3),
            ("--deterministic", "--memory-format", "channels_last"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("serial", 1), ("dist", 3), (), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_inside_an_epoch_with_other_workers_of_another_engine(
    train, tmp_path, first, then, changed
):
    """Killed after five steps of seven; the rest of the epoch is trained once, as by one."""
    precise = ("--dtype", "float64")
    alone, folder = tmp_path / "alone", tmp_path / "relay"
    assert train(alone, "alexnet", "serial", 1, *precise).returncode == 0
    assert train(folder, "alexnet", *first, *precise, fault="kill-5").returncode != 0
    state = checkpoint.load(folder / checkpoint.LATEST)
    assert 0 < state["step_seconds"] < 1000
    manager.save(folder, {**state, "step_seconds": 1000.0}, is_best=False)
    result = train(folder, "alexnet", *then, *precise, *changed, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "after epoch 0, step 3" in result.stdout
    # The memory format is only another way to the same numbers, rounding aside.
    note = "note: changed since the checkpoint: --deterministic False -> True\n"
    assert (note in result.stdout) == bool(changed)
    assert ("changed since the checkpoint" in result.stdout) == bool(changed)
    # The time before counts as well.
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert 1000 < row["seconds"] < 2000
    assert row["images_per_second"] == round(197 / row["seconds"], 1)
    (before,) = json.loads((folder / "args.json").read_text())["earlier"]
    assert before["workers"] == first[1]
    assert f"{first[1]} worker(s) have trained so far, now {then[1]}" in result.stdout
    weights = [checkpoint.load(f / checkpoint.LATEST)["state_dict"] for f in (alone, folder)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-9, name


def test_a_run_remembers_what_it_was_trained_with(train, tmp_path):
    """Its checkpoints do, whatever becomes of args.json, and forget what is not in the weights."""
    folder, args = tmp_path / "run", tmp_path / "run" / "args.json"

    def go_on(*flags, resume="auto"):
        result = train(folder, "alexnet", "serial", 1, *flags, "--resume", resume)
        assert result.returncode == 0, result.stderr
        rates = [one["options"]["lr"] for one in json.loads(args.read_text()).get("earlier", [])]
        return result.stdout, rates

    assert go_on("--epochs", "1")[1] == []
    shutil.copy(folder / checkpoint.LATEST, folder / "first.pth.tar")
    text, rates = go_on("--lr", "0.01")
    assert rates == [0.02]
    assert "note: changed since the checkpoint: --epochs 1 -> 2, --lr 0.02 -> 0.01\n" in text
    args.write_text("{")
    assert go_on("--lr", "0.01", "--epochs", "3")[1] == [0.02, 0.01]  # the same, to two epochs
    assert go_on("--epochs", "2", resume=folder / "first.pth.tar")[1] == [0.02]  # to one epoch
    args.unlink()
    args.mkdir()
    result = train(folder, "alexnet", "serial", 1, "--epochs", "3", "--resume", "auto")
    assert result.returncode == 2
    assert f"error: --checkpoint {folder}: cannot be written to (Is a dir" in result.stderr
    assert not (folder / ".lock").exists()


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
