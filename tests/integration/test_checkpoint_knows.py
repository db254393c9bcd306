"""What a checkpoint knows counts: statistics, classes, data set, and how far its run has come."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.warm import run_warm
from utils.checkpoint import format as checkpoint
from utils.files import ROOT

RESNET = "-a resnet --depth 8 --train-batch 32 --lr 0.05 --schedule 1000".split()
SYNTHETIC = ["-d", "synthetic10", "--train-size", "320", "--test-size", "100"]
CLASSES = ["ant", "bee", "cow"]
COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


@pytest.fixture(scope="module")
def legacy(tmp_path_factory):
    """A run whose images were normalised with the legacy statistics."""
    folder = tmp_path_factory.mktemp("legacy") / "run"
    flags = [*RESNET, *SYNTHETIC, "--epochs", "2", "--stats", "legacy", "-c", folder]
    result = run_warm([ROOT / "cifar.py", *flags])
    assert result.returncode == 0, result.stderr
    return folder


def score(result):
    assert result.returncode == 0, result.stderr
    return re.findall(r"^Test Loss.*", result.stdout, re.M)


@pytest.fixture
def evaluate(run_script):
    def start(file, *flags):
        return run_script([*RESNET, "-e", "--resume", file, *flags])

    return start


def forget(file, path, *keys, **changes):
    """Write a copy of a checkpoint without some keys, as a file of another script."""
    state = checkpoint.load(file)
    old = {k: v for k, v in state.items() if k not in ("format", "read_as", *keys)}
    torch.save({**old, **changes}, path)
    return path


def test_an_evaluation_has_the_statistics_of_the_training(legacy, evaluate):
    file = legacy / checkpoint.LATEST
    unsaid, said = evaluate(file, *SYNTHETIC), evaluate(file, *SYNTHETIC, "--stats", "legacy")
    (logged,) = re.findall(r'"valid_top1": ([\d.]+)', (legacy / "metrics.jsonl").read_text())[-1:]
    assert score(unsaid) == score(said)
    assert f"Test Acc: {float(logged):.2f}" in unsaid.stdout
    assert "test set of synthetic10, 100 images; 10 classes (of the file)" in unsaid.stdout
    assert "std 0.2023 0.1994 0.2010 (of the file)" in unsaid.stdout


def test_it_is_the_same_on_every_engine(legacy, launch):
    file = legacy / checkpoint.LATEST
    result = launch([*RESNET, *SYNTHETIC, "-e", "--resume", str(file)])
    assert result.returncode == 0, result.stderr
    (logged,) = re.findall(r'"valid_top1": ([\d.]+)', (legacy / "metrics.jsonl").read_text())[-1:]
    assert f"Test Acc: {float(logged):.2f}" in result.stdout
    assert result.stdout.count("std 0.2023 0.1994 0.2010 (of the file)") == 1


def test_a_flag_that_says_otherwise_is_refused_with_both_values(legacy, evaluate, run_script):
    file = legacy / checkpoint.LATEST
    going_on = run_script(
        [*RESNET, *SYNTHETIC, "--epochs", "3", "--resume", file, "--stats", "true"]
    )
    for result in (evaluate(file, *SYNTHETIC, "--stats", "true"), going_on):
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: --stats true: ")
        for words in ("0.2049", "0.2023 0.1994 0.2010", str(file), "leave --stats out"):
            assert words in line


def test_a_run_goes_on_with_the_statistics_that_it_has_begun_with(legacy, run_script, tmp_path):
    flags = [*RESNET, *SYNTHETIC, "--epochs", "3", "-c", tmp_path / "run"]
    result = run_script([*flags, "--resume", legacy / checkpoint.LATEST])
    assert result.returncode == 0, result.stderr
    state = checkpoint.load(tmp_path / "run" / checkpoint.LATEST)
    assert state["std"] == [0.2023, 0.1994, 0.2010]
    assert state["options"]["stats"] == "legacy"
    assert "--stats" not in result.stdout, "nothing has changed"


def test_a_file_that_does_not_say_is_taken_for_one_of_an_older_script(legacy, evaluate, tmp_path):
    old = forget(legacy / checkpoint.LATEST, tmp_path / "old.pth", "mean", "std", "options")
    assumed = evaluate(old, *SYNTHETIC)
    assert "does not say how its images were normalised" in assumed.stdout
    assert score(assumed) == score(evaluate(legacy / checkpoint.LATEST, *SYNTHETIC))
    other = evaluate(old, *SYNTHETIC, "--stats", "true")
    assert "(by --stats)" in other.stdout
    assert score(other) != score(assumed)


def test_the_data_set_is_that_of_the_file_unless_a_flag_says(legacy, evaluate):
    file = legacy / checkpoint.LATEST
    result = evaluate(file, "--test-size", "100")
    assert "was trained on synthetic10" in result.stdout
    assert score(result) == score(evaluate(file, *SYNTHETIC))
    archive = evaluate(file, "--data-md5", 32 * "0")
    assert archive.returncode == 2
    assert "-d synthetic10 reads no archive" in archive.stderr
    for other in ("synthetic100", "cifar10"):  # Known before anything is downloaded.
        refused = evaluate(file, "-d", other)
        assert refused.returncode == 2
        assert f"-d {other}: {file} was trained on synthetic10" in refused.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder data set that a network learns at once: a colour a class."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 4)):
        for name, colour in zip(CLASSES, COLOURS, strict=True):
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(noise.normal(colour, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


def test_classes_are_told_by_their_names(folder, run_script, evaluate, tmp_path):
    """The same network with its classes in another order scores the same."""
    data = ["-d", "folder", "--data", folder]
    run = run_script([*RESNET, *data, "--epochs", "6", "-c", tmp_path / "run"])
    assert run.returncode == 0, run.stderr
    state = checkpoint.load(tmp_path / "run" / checkpoint.LATEST)
    assert state["acc"] == 100.0
    order, weights = [2, 0, 1], state["state_dict"]
    for name in ("fc.weight", "fc.bias"):
        weights[name] = weights[name][order]
    turned = forget(
        tmp_path / "run" / checkpoint.LATEST, tmp_path / "turned.pth",
        classes=[CLASSES[i] for i in order], state_dict=weights,
    )  # fmt: skip
    result = evaluate(turned, *data, "--per-class")
    assert "Test Acc: 100.00 (12 of 12)" in result.stdout, result.stdout + result.stderr
    assert "classes in another order" in result.stdout
    assert f"test set of folder {folder}, 12 images; 3 classes (of the file)" in result.stdout
    assert re.findall(r"^(\w+)  100.00 %", result.stdout, re.M) == [CLASSES[i] for i in order]
    # It goes on from there, too: the first epoch keeps what it has learnt.
    more = run_script([*RESNET, *data, "--epochs", "7", "--resume", turned, "-c", tmp_path / "b"])
    assert "Last acc: 100.00" in more.stdout, more.stderr
    assert checkpoint.load(tmp_path / "b" / checkpoint.LATEST)["classes"][0] == "cow"

    (folder / "train" / "cow").rename(folder / "train" / "yak")
    (folder / "test" / "cow").rename(folder / "test" / "yak")
    refused = evaluate(turned, *data)
    assert refused.returncode == 2
    assert "only these images have yak, only the file has cow" in refused.stderr


# --- how far a run has come ----------------------------------------------------------------------

SMALL = ["-a", "alexnet", "-d", "synthetic10", "--train-size", "128", "--test-size", "50",
         "--train-batch", "32", "--schedule", "1000"]  # fmt: skip


@pytest.fixture
def trained(run_script, tmp_path):
    """A run of three epochs, and what starts it again with other flags."""
    folder = tmp_path / "run"

    def start(*flags, to=folder):
        return run_script([*SMALL, "--epochs", "3", "-c", to, *flags])

    assert start().returncode == 0
    return folder, start


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_finished_run_is_finished(trained):
    """The same command once more, as in a chain of jobs, is no failure and changes nothing."""
    folder, start = trained
    before = contents(folder)
    state = checkpoint.load(folder / checkpoint.LATEST)
    result = start("--resume", "auto")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    for words in ("finished: ", str(folder), "3 epochs", f"Last acc: {state['acc']:.2f}",
                  f"Best acc: {state['best_acc']:.2f} (epoch {state['best_epoch']})",
                  "test set of synthetic10, 50 images; 10 classes (of the file)"):  # fmt: skip
        assert words in line
    assert contents(folder) == before
    assert "--lr 0.1 -> 0.2" in start("--resume", "auto", "--lr", "0.2").stdout
    for flags, words in (
        (["--stats", "legacy"], "--stats legacy: is mean"),
        (["-d", "cifar10"], "was trained on synthetic10"),
        (["-a", "resnet"], "holds alexnet"),
    ):
        other = start("--resume", "auto", *flags)
        assert other.returncode == 2
        assert words in other.stderr
    # A file that is named is asked for; that it has no epochs left is worth an error.
    named = start("--resume", folder / checkpoint.LATEST)
    assert named.returncode == 2
    assert "--epochs" in named.stderr


def epochs(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len((folder / "log.txt").read_text().splitlines()) == 1 + len(lines)
    return [json.loads(line)["epoch"] for line in lines]


@pytest.mark.parametrize(
    "flags",
    [
        ("--resume", checkpoint.PREVIOUS),
        ("--start-epoch", "1", "--resume", checkpoint.LATEST),
        ("--start-epoch", "0", "--resume", checkpoint.BEST),
    ],
    ids=["an older file", "--start-epoch", "the very beginning"],
)
def test_going_back_keeps_what_was_newer(trained, flags):
    folder, start = trained
    before = contents(folder)
    result = start(*flags[:-1], folder / flags[-1], "--lr", "0.2")
    assert result.returncode == 0, result.stderr
    kept = folder / "replaced-1"
    assert f"warning: going back from epoch 3: the newer files of {folder} are kept in {kept}" in (
        result.stdout
    )
    assert contents(kept) == before
    assert not (folder / "replaced-2").exists()
    assert epochs(folder) == epochs(kept) == [1, 2, 3]
    assert not (folder / checkpoint.DAMAGED).exists()
    assert start("--resume", kept / checkpoint.LATEST, "--epochs", "4", to=kept).returncode == 0


def test_the_best_weights_come_along_into_another_folder(trained, tmp_path):
    """With --val-split they are scored at the end."""
    _, start = trained
    split = ["--val-split", "32", "--lr", "1e-9"]  # After its first epoch nothing gets better.
    one, two, three = (tmp_path / name for name in "abc")
    assert start(*split, to=one).returncode == 0
    assert checkpoint.load(one / checkpoint.LATEST)["best_epoch"] == 1
    more = [*split, "--epochs", "4"]
    result = start(*more, "--resume", one / checkpoint.LATEST, to=two)
    assert result.returncode == 0, result.stderr
    assert re.search(r"Best acc: [\d.]+ \(epoch 1, test set; chosen by", result.stdout)
    assert (two / checkpoint.BEST).read_bytes() == (one / checkpoint.BEST).read_bytes()
    # Without them nothing is scored in their place.
    (one / checkpoint.BEST).unlink()
    result = start(*more, "--resume", one / checkpoint.LATEST, to=three)
    assert result.returncode == 0, result.stderr
    assert "Best acc: not known (epoch 1, test set; chosen by" in result.stdout
    assert not (three / checkpoint.BEST).exists()


@pytest.mark.parametrize(
    "change", [["--val-split", "32"], ["--test-size", "40"]], ids=["--val-split", "test images"]
)
def test_an_accuracy_on_other_images_is_not_compared(trained, change):
    """The best epoch counts anew, and the best weights so far are kept elsewhere."""
    folder, start = trained
    best = (folder / checkpoint.BEST).read_bytes()
    result = start("--resume", "auto", "--epochs", "4", *change)
    assert result.returncode == 0, result.stderr
    assert "its accuracies were measured on other images" in result.stdout
    assert "(epoch 4, " in re.search("^Best acc.*", result.stdout, re.M)[0]
    assert checkpoint.load(folder / checkpoint.BEST)["epoch"] == 4
    assert (folder / "replaced-1" / checkpoint.BEST).read_bytes() == best
    finished = start("--resume", "auto", "--epochs", "4")
    assert "Last acc: not known, Best acc: not known" in finished.stdout


def test_a_damaged_newest_checkpoint_does_not_hide_that_a_run_goes_back(trained):
    """Also where its log begins late: epochs count, not rows."""
    folder, start = trained
    (folder / checkpoint.LATEST).unlink()  # It may be one file with the best.
    (folder / checkpoint.LATEST).write_bytes(b"half")
    for name in ("log.txt", "metrics.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:-3] + lines[-2:]))
    before = contents(folder)
    assert start("--resume", folder / checkpoint.BEST).returncode == 0
    assert contents(folder / "replaced-1") == before


def test_a_best_model_with_its_log_alone_is_a_run_that_goes_back(trained):
    """As people share them: the newest checkpoint is not there, and the log knows more epochs."""
    folder, start = trained
    rows = (folder / "log.txt").read_text()
    state = checkpoint.load(folder / checkpoint.PREVIOUS)
    assert state["epoch"] == 2
    (folder / checkpoint.PREVIOUS).rename(folder / "shared.pth.tar")
    (folder / checkpoint.LATEST).unlink()
    assert start("--resume", folder / "shared.pth.tar").returncode == 0
    assert (folder / "replaced-1" / "log.txt").read_text() == rows
    assert epochs(folder) == [1, 2, 3]


@pytest.mark.parametrize("how", ["link", "detour", "trusted"])
def test_the_newest_checkpoint_is_known_by_whatever_name(trained, how):
    """It is never taken for a damaged one, and no link takes its place."""
    folder, start = trained
    file, flags = folder / checkpoint.LATEST, ["--epochs", "4"]
    if how == "link":
        (folder / "latest").symlink_to(checkpoint.LATEST)
        file = folder / "latest"
    elif how == "detour":
        file = folder / ".." / folder.name / checkpoint.LATEST
    else:  # Also where another of its files needs trust.
        for name in (checkpoint.LATEST, checkpoint.BEST):
            state = checkpoint.load(folder / name)
            torch.save({"net": state["state_dict"], "epoch": state["epoch"],
                        "acc": np.float64(99 + (name == checkpoint.BEST) / 2), "best_acc": 99.5},
                       folder / name)  # fmt: skip
        flags += ["--trust-checkpoint", "--val-split", "32"]
    (folder / checkpoint.PREVIOUS).unlink()
    result = start("--resume", file, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not (folder / checkpoint.DAMAGED).exists()
    assert not any((folder / name).is_symlink() for name in (checkpoint.LATEST, checkpoint.BEST))
    assert checkpoint.load(folder / checkpoint.LATEST)["epoch"] == 4
    if how == "trusted":
        assert re.search(r"Best acc: [\d.]+ \(epoch not known, test set; chosen by", result.stdout)


def test_a_better_model_of_an_older_script_is_not_replaced(run_script, tmp_path):
    """Its best accuracy stands under another key, and it has not kept the epoch."""
    assert run_script([*SMALL, "--epochs", "1", "-c", tmp_path / "ours"]).returncode == 0
    ours = tmp_path / "ours" / checkpoint.LATEST
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, acc in ((checkpoint.LATEST, 90.0), (checkpoint.BEST, 99.5)):
        forget(
            ours, folder / name, "best_acc", "best_epoch", "acc", best_prec1=99.5, acc1=acc
        )  # fmt: skip
    best = (folder / checkpoint.BEST).read_bytes()
    flags = [*SMALL, "--epochs", "3", "--resume", folder / checkpoint.LATEST]
    result = run_script(flags)
    assert result.returncode == 0, result.stderr
    assert "Best acc: 99.50 (epoch not known, as an older script says" in result.stdout
    assert (folder / checkpoint.BEST).read_bytes() == best


def test_a_best_model_of_unknown_accuracy_is_kept(run_script, tmp_path):
    assert run_script([*SMALL, "--epochs", "1", "-c", tmp_path / "ours"]).returncode == 0
    folder = tmp_path / "theirs"
    folder.mkdir()
    ours = tmp_path / "ours" / checkpoint.LATEST
    for name in (checkpoint.LATEST, checkpoint.BEST):
        forget(ours, folder / name, "best_acc", "best_epoch", "acc")
    best = (folder / checkpoint.BEST).read_bytes()
    result = run_script([*SMALL, "--epochs", "2", "--resume", folder / checkpoint.LATEST])
    assert result.returncode == 0, result.stderr
    assert "model_best.pth.tar cannot be compared: kept in" in result.stdout
    assert (folder / "replaced-1" / checkpoint.BEST).read_bytes() == best
