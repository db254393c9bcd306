"""Training runs of the real scripts: what they print, what they leave, and that engines agree."""

import json
import re

import pytest
import torch

from cifar import run as program
from helpers.warm import run_warm
from tools.commands import SCRIPTS, engine_command
from utils.checkpoint import format as checkpoint
from utils.distributed.ddp import DDPComm
from utils.files import ROOT
from utils.launch.commands import has_horovod
from utils.metrics.plot import read_log
from utils.metrics.run_log import LOG_COLUMNS
from utils.runtime.exit_codes import run_worker

# A run of a few seconds: part of the synthetic data.
QUICK = "-d synthetic10 --train-size 400 --test-size 101 --train-batch 64 --epochs 2".split()

PRECISE = [*QUICK, "-a", "alexnet", "--lr", "0.01", "--dtype", "float64"]


def weights(folder):
    return checkpoint.load(folder / checkpoint.LATEST)["state_dict"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one process's run, in float64."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    result = run_warm([ROOT / "cifar.py", *PRECISE, "-c", folder])
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_leaves_the_promised_files_and_trains_what_one_process_trains(
    launch, engine, alone, tmp_path
):
    """Written once, run on every engine."""
    folder = tmp_path / "run"
    workers = {"serial": 1, "dist": 3, "horovod": 2}[engine]
    result = launch([*PRECISE, "-c", str(folder)], workers=workers)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "args.json", "checkpoint.previous.pth.tar", "checkpoint.pth.tar", "log.png", "log.txt",
        "metrics.jsonl", "model_best.pth.tar",
    ]  # fmt: skip
    log, log_alone = (read_log(f / "log.txt") for f in (folder, alone))
    assert tuple(log) == LOG_COLUMNS
    assert [len(column) for column in log.values()] == [2] * 5
    assert log["Valid Acc."] == log_alone["Valid Acc."]
    assert (folder / "log.png").read_bytes().startswith(b"\x89PNG")
    args = json.loads((folder / "args.json").read_text())
    assert args["options"]["arch"] == "alexnet"
    assert args["versions"]["torch"] == torch.__version__
    assert result.stdout.count("Last acc:") == result.stdout.count("Best acc:") == 1
    assert result.stdout.count("Epoch: [1 | 2]") == 1, "rank 0 alone prints"
    assert "64 images per step over all workers" in result.stdout
    wanted, got = weights(alone), weights(folder)
    for name, tensor in wanted.items():
        assert (tensor - got[name]).abs().max() < 1e-9, name


# An epoch of 1,000 images whose last batch, of 104, three workers cannot share evenly.
EPOCH = (
    "-d synthetic10 --train-size 1000 --test-size 200 --train-batch 128 --epochs 1 --schedule 1 "
    "--dtype float64"
).split()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("network", "tolerance"),
    [("-a alexnet", 1e-9), ("-a resnet --depth 20 --sync-bn", 1e-7),
     ("-a wrn --depth 10 --widen-factor 1 --drop 0.3 --sync-bn", 1e-7)],
)  # fmt: skip
def test_an_epoch_is_the_same_on_one_to_four_workers_of_either_engine(
    run, tmp_path, network, tolerance
):
    runs = {}
    arms = [("serial", 1), *((e, n) for e in ("dist", "horovod") for n in (1, 2, 3, 4))]
    for engine, workers in arms:
        if engine == "horovod" and not has_horovod():
            continue
        folder = tmp_path / f"{engine}{workers}"
        command = engine_command(engine, workers, str(ROOT / SCRIPTS[engine]))
        trace = folder / "trace.json"
        result = run([*command, *EPOCH, *network.split(), "-c", folder, "--trace", trace])
        assert result.returncode == 0, result.stderr
        runs[engine, workers] = weights(folder), json.loads(trace.read_text())["loss"]
    wanted, losses = runs["serial", 1]
    for arm, (got, trace) in runs.items():
        assert len(trace) == 8
        assert max(abs(a - b) for a, b in zip(losses, trace, strict=True)) < tolerance, arm
        for name, tensor in wanted.items():
            assert (tensor - got[name]).abs().max() < tolerance, (arm, name)


class TestRunFolder:
    @pytest.fixture
    def finished(self, run_script, tmp_path):
        """A folder that holds a finished run, and the flags that made it."""
        flags = [*QUICK, "-a", "alexnet", "--epochs", "1", "-c", str(tmp_path / "run")]
        assert run_script(flags).returncode == 0
        return tmp_path / "run", flags

    def test_is_not_overwritten_in_silence_and_evaluates_to_what_was_logged(
        self, finished, run_script
    ):
        folder, flags = finished
        before = (folder / checkpoint.LATEST).read_bytes()
        again = run_script(flags)
        assert again.returncode == 2
        for way_out in ("--resume auto", "--overwrite"):
            assert way_out in again.stderr
        assert len(again.stderr.strip().splitlines()) == 1
        assert (folder / checkpoint.LATEST).read_bytes() == before

        accuracy = read_log(folder / "log.txt")["Valid Acc."][0]
        evaluate = ["-e", "--per-class", "--resume", str(folder / checkpoint.LATEST)]
        reports = []
        for workers in (1, 3):
            shown = run_script([*flags, *evaluate], workers=workers)
            assert shown.returncode == 0, shown.stderr
            assert f"Test Acc: {accuracy:.2f}" in shown.stdout
            assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
            reports.append(re.findall(r"^.*\(\d+ of \d+\)", shown.stdout, re.M))
        assert reports[0] == reports[1], "the evaluation depends on the number of workers"
        *classes, whole = [
            tuple(map(int, re.search(r"\((\d+) of (\d+)\)", line).groups())) for line in reports[0]
        ]
        assert len(classes) == 10
        assert tuple(map(sum, zip(*classes, strict=True))) == whole == (whole[0], 101)

        assert run_script([*flags, "--overwrite"]).returncode == 0

    def test_rows_of_a_log_are_not_lost_with_the_checkpoint(self, finished, run_script):
        folder, flags = finished
        for name in (checkpoint.LATEST, checkpoint.BEST):
            (folder / name).unlink()
        rows = (folder / "log.txt").read_text()
        result = run_script([*flags, "--resume", "auto"])
        assert result.returncode == 2
        assert "--overwrite" in result.stderr
        assert (folder / "log.txt").read_text() == rows


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("-a resnet --depth 21", ["--depth 21", "6n + 2", "20, 26"]),
        ("-a preresnet --depth 21 --block-name bottleneck", ["--depth 21", "9n + 2", "20, 29"]),
        ("-a resnet --block-name wide", ["--block-name wide", "bottleneck"]),
        ("-a alexnt", ["-a 'alexnt'", "did you mean alexnet?"]),
        ("-a alexnet --depth 20", ["--depth 20", "alexnet does not take it"]),
        ("-a wrn --growthRate 12", ["--growthRate 12", "wrn does not take it"]),
        ("--backward-passes-per-step 65", ["--train-batch 64", "smaller than 65"]),
        ("--resume no/such/file", ["--resume no/such/file", "no such file"]),
        (f"--data-md5 {'0' * 32}", ["--data-md5", "-d cifar10"]),
        ("--val-split 400", ["--val-split 400", "fewer"]),
        ("--train-size 50001", ["--train-size 50001", "50000"]),
        ("--gpu-id 7", ["--gpu-id 7", "leave the flag out"]),
        ("--gpu-id x", ["--gpu-id 'x'", "0,1"]),
        ("--adasum", ["--adasum", "Horovod"]),
        ("-d folder --data no/such", ["--data no/such", "train"]),
        ("-d cifar10 --data-archive no.tgz", ["--data-archive no.tgz", "no such file"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_worker(DDPComm, program, [*QUICK, *flags.split()]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


def test_bad_input_of_several_workers_is_one_line_too(run, tmp_path):
    """Through the launcher: its own failure report stays off the screen."""
    command = [ROOT / "launcher.sh", "-m", "resnet20", "-n", "2", "-d", "synthetic10", "--"]
    result = run([*command, "--depth", "21", "-c", tmp_path / "run"])
    assert result.returncode == 2
    assert result.stderr == (
        "error: -a resnet --depth 21: a ResNet with basic blocks needs depth = 6n + 2 "
        "(nearest: 20, 26)\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_written_to_is_bad_input(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert (
        run_worker(
            DDPComm, program, [*QUICK, "-a", "alexnet", "-c", str(tmp_path / "file" / "run")]
        )
        == 2
    )
    assert "-c DIR" in capfd.readouterr().err


def test_the_flags_of_a_run_that_needs_more_than_the_defaults(run_script, tmp_path):
    """Held-out images select the best epoch; sync-bn, warm-up, passes and the rest run together."""
    flags = "-a resnet --depth 8 --val-split 100 --sync-bn --warmup-steps 3 --nesterov"
    more = "--pad-mode reflect --stats legacy --deterministic --tensorboard --compression fp16"
    result = run_script(
        [*QUICK, *flags.split(), *more.split(), "--backward-passes-per-step", "2", "-c",
         str(tmp_path / "run")],
        workers=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "300 to train" in result.stdout
    assert "100 to validate" in result.stdout
    assert "chosen by validation accuracy" in result.stdout
    assert list((tmp_path / "run").glob("events.out.tfevents*"))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(run_script, tmp_path):
    result = run_script(
        [*QUICK, "-a", "alexnet", "--lr", "1e9", "-c", str(tmp_path / "run")], workers=2
    )
    assert result.returncode != 0
    assert "learning rate" in result.stderr
    assert not (tmp_path / "run" / checkpoint.LATEST).exists()


def test_an_estimate_starts_nothing_and_counts_what_is_known(run_script, tmp_path):
    """The first block of ResNet-20 alone keeps 16 planes of an image several times."""
    folder = tmp_path / "run"
    flags = "-d synthetic10 --train-size 400 --test-size 100 --train-batch 64 --epochs 90".split()
    result = run_script(
        [*flags, "-a", "resnet", "--depth", "20", "--estimate", "-c", folder], workers=2
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    # Each line comes once, for rank 0 alone prints.
    assert [word for word, _ in rows] == ["parameters", "activations", "memory", "speed", "time"]
    lines = dict(rows)
    assert lines["parameters"].startswith("272,474: 1.0 MiB")
    assert "for 32 of 64 images" in lines["activations"]
    assert 1 < float(re.search(r"\(([\d.]+) MiB an image", lines["activations"])[1]) < 3
    assert "90 epochs" in lines["time"]
    assert not folder.exists()
