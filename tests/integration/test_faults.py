"""Signals, full disks, damaged files and numbers that are not finite: what a run survives."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers.process import environment, run, wait_until, workers_below
from helpers.runs import COMMON, MODELS, same
from helpers.warm import run_warm
from utils.checkpoint import format as checkpoint
from utils.files import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a run that nothing happens to, by model, engine and workers; trained once."""
    folders = {}

    def get(train, model, engine, workers):
        key = (model, engine, workers)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("untouched") / "run"
            result = train(folders[key], *key)
            assert result.returncode == 0, result.stderr
        return folders[key]

    return get


class TestSignals:
    """One more step, a checkpoint, exit code 75; resumed it is the run that nobody touched."""

    @pytest.mark.parametrize(
        ("model", "engine", "workers", "fault"),
        [
            ("resnet", "dist", 2, "term-4"),  # reaches one worker only
            pytest.param("alexnet", "horovod", 2, "usr1-9", marks=pytest.mark.slow),
            pytest.param("wrn with dropout", "serial", 1, "int-6", marks=pytest.mark.slow),
            ("resnet", "dist", 2, "term-in-evaluation"),
            pytest.param("resnet", "horovod", 2, "term-in-evaluation", marks=pytest.mark.slow),
            pytest.param("resnet", "dist", 3, "term-6", marks=pytest.mark.slow),  # the last step
        ],
    )
    def test_stopped_and_resumed_equals_untouched(
        self,
        train,
        untouched,
        tmp_path,
        model,
        engine,
        workers,
        fault,
    ):
        folder = tmp_path / "stopped"
        result = train(folder, model, engine, workers, fault=fault)
        assert (result.returncode, result.stderr) == (75, "")
        assert result.stdout.count("saved; --resume auto goes on from there") == 1
        result = train(folder, model, engine, workers, "--resume", "auto")
        assert result.returncode == 0, result.stderr
        same(untouched(train, model, engine, workers), folder)

    @pytest.mark.slow
    def test_usr2_saves_and_goes_on(self, train, untouched, tmp_path):
        """Killed at the step after next; without the save it would go on from step 3."""
        folder = tmp_path / "saved"
        result = train(folder, "resnet", "dist", 2, fault="usr2-4+kill-6")
        assert result.returncode != 0
        state = checkpoint.load(folder / checkpoint.LATEST)
        assert (state["epoch"], state["step"]) == (0, 6)
        assert train(folder, "resnet", "dist", 2, "--resume", "auto").returncode == 0
        same(untouched(train, "resnet", "dist", 2), folder)


class TestNotFinite:
    """What becomes of a loss that is NaN on one worker of two."""

    @pytest.mark.parametrize("engine", ["dist", pytest.param("horovod", marks=pytest.mark.slow)])
    def test_the_run_stops_and_keeps_nothing_of_it(self, train, tmp_path, engine):
        folder = tmp_path / "stop"
        result = train(folder, "resnet", engine, 2, fault="nan-4")
        assert result.returncode == 3
        (line,) = result.stderr.splitlines()
        for words in ("epoch 1, step 5 of 7", "learning rate 0.02", "rank 1", str(folder)):
            assert words in line
        state = checkpoint.load(folder / checkpoint.LATEST)
        assert (state["epoch"], state["step"]) == (0, 3)
        assert all(t.isfinite().all() for t in state["state_dict"].values())

    def test_a_step_is_left_out_if_wanted(self, train, tmp_path):
        result = train(tmp_path / "skip", "resnet", "dist", 2, "--on-nan", "skip", fault="nan-4..5")
        assert result.returncode == 0, result.stderr
        assert "step 5 of 7 (learning rate 0.02): the loss or gradient is not finite on rank 1" in (
            result.stdout
        )
        assert "the step is left out (2 in a row)" in result.stdout
        (record, _) = metrics(tmp_path / "skip")
        assert record["train_loss"] == record["train_loss"]  # no NaN

    def test_leaving_out_has_an_end(self, train, tmp_path):
        result = train(
            tmp_path / "skip", "alexnet", "serial", 1, "--on-nan", "skip", fault="nan-2..99"
        )
        assert result.returncode == 3
        assert "(10 in a row)" in result.stdout
        assert "(11 in a row)" not in result.stdout
        assert result.stderr.startswith("error: epoch 2, step 6 of 7")

    @pytest.mark.parametrize("engine", ["serial", pytest.param("dist", marks=pytest.mark.slow)])
    def test_the_run_goes_back_if_wanted(self, train, tmp_path, engine):
        """From the save after step 3, and on from step 6: two finite steps are left out too."""
        folder = tmp_path / "rewind"
        workers = {"serial": 1, "dist": 2}[engine]
        result = train(folder, "resnet", engine, workers, "--on-nan", "rewind", fault="nan-5")
        assert result.returncode == 0, result.stderr
        assert "going back to" in result.stdout
        assert "(epoch 1, step 3) and on from step 7" in result.stdout
        state = checkpoint.load(folder / checkpoint.LATEST)
        assert all(t.isfinite().all() for t in state["state_dict"].values())
        assert len(metrics(folder)) == 2


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestDisk:
    """A disk that is full, and files that are not what was written."""

    def test_a_full_disk_costs_saves_and_not_the_run(self, train, untouched, tmp_path):
        """No room from step 2 to step 8: the saves at 3 and 6 and at the end of the epoch fail."""
        folder = tmp_path / "full"
        result = train(folder, "alexnet", "dist", 2, fault="full-2+free-8")
        assert result.returncode == 0, result.stderr
        warnings = [line for line in result.stdout.splitlines() if line.startswith("warning:")]
        saves = [line for line in warnings if checkpoint.LATEST in line]
        assert len(saves) == 3
        assert all("File too large" in line and "MiB free" in line for line in saves)
        same(untouched(train, "alexnet", "dist", 2), folder)
        assert not list(folder.glob(".*.tmp"))

    @pytest.mark.slow
    def test_a_disk_that_stays_full_fails_the_run_at_its_end(self, train, tmp_path):
        folder = tmp_path / "full"
        result = train(folder, "alexnet", "serial", 1, fault="full-9")
        assert result.returncode == 3
        assert result.stderr.count("error:") == 1
        assert "could not be written" in result.stderr
        assert "Epoch: [2 | 2]" in result.stdout
        assert checkpoint.load(folder / checkpoint.LATEST)["step"] == 0  # of the first epoch's end

    def test_a_damaged_newest_gives_way_to_the_save_before(
        self,
        train,
        untouched,
        tmp_path,
    ):
        folder = tmp_path / "damaged"
        assert train(folder, "resnet", "dist", 2, fault="kill-10").returncode != 0
        newest = folder / checkpoint.LATEST
        newest.write_bytes(newest.read_bytes()[:-1000])
        result = train(folder, "resnet", "dist", 2, "--resume", "auto")
        assert result.returncode == 0, result.stderr
        assert f"going back to the save before, {checkpoint.PREVIOUS}" in result.stdout
        assert (folder / checkpoint.DAMAGED).exists()
        same(untouched(train, "resnet", "dist", 2), folder)

        for path in (newest, folder / checkpoint.PREVIOUS):
            path.write_bytes(b"")
        result = train(folder, "resnet", "serial", 1, "--resume", "auto")
        assert result.returncode == 2
        assert "--overwrite starts anew" in result.stderr


class TestFolder:
    """One run in one folder."""

    def test_a_second_run_is_refused_with_the_first_ones_process(self, tmp_path):
        folder = tmp_path / "run"
        flags = [*COMMON, *MODELS["alexnet"], "-c", str(folder), "--epochs", "500"]
        command = [sys.executable, str(ROOT / "cifar.py"), *flags]
        first = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            while not first.stdout.readline().startswith("Epoch:"):
                assert first.poll() is None
            for more in ([], ["--resume", "auto"], ["--overwrite"]):
                second = run_warm([*command[1:], *more])
                assert second.returncode == 2
                assert f"process {first.pid} on " in second.stderr
                assert second.stderr.count("\n") == 1
            begin = time.monotonic()
            first.terminate()
            first.communicate(timeout=60)
            assert first.returncode == 75
            assert time.monotonic() - begin < 10
        finally:
            first.kill()
            first.communicate()
        assert checkpoint.load(folder / checkpoint.LATEST)["state_dict"]


@pytest.mark.parametrize(
    ("engine", "fault", "difference"),
    [
        ("dist", "other-option", "--lr"),
        pytest.param("horovod", "other-data", "set of images", marks=pytest.mark.slow),
    ],
)
def test_workers_that_run_something_else_are_found_at_the_start(
    train, tmp_path, engine, fault, difference
):
    result = train(tmp_path / "run", "alexnet", engine, 2, fault=fault)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: rank 1 has another {difference} than rank 0")
    assert not (tmp_path / "run").exists()


class TestRestarts:
    """A worker fails once; the job goes on by itself and ends as if untouched."""

    @pytest.mark.parametrize(
        ("engine", "fault", "shown"),
        [
            pytest.param(
                "dist",
                "kill-one-5",
                "rank 1 was ended by signal 9 (SIGKILL); restart 1 of 2",
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "horovod",
                "raise-9",
                "rank 1 failed with exit code 1; restart 1 of 2",
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "dist", "sleep-4", "step 5 of epoch 1); restart 1 of 2", marks=pytest.mark.slow
            ),
            pytest.param(
                "horovod", "stop-4", "stopped by a signal); restart 1 of 2", marks=pytest.mark.slow
            ),
            pytest.param("dist", "kill-1", "restart 1 of 2", marks=pytest.mark.slow),
        ],
    )
    def test_a_fault_costs_nothing(self, train, untouched, tmp_path, engine, fault, shown):
        folder = tmp_path / "run"
        # The scripts of this family begin at epoch 0 by this flag; a restart goes on all the same.
        flags = ("--timeout", "10", "--start-epoch", "0")
        result = train(folder, "resnet", engine, 2, *flags, fault=fault, restarts=2)
        assert result.returncode == 0, result.stderr
        assert shown in result.stderr
        assert result.stderr.count("restart") == 1
        assert (" in _sleep\n" in result.stderr) == fault.startswith("sleep")  # its stack
        same(untouched(train, "resnet", engine, 2), folder)

    @pytest.mark.slow
    def test_torchrun_restarts_too(self, train, untouched, tmp_path):
        """Its own restarts, without our launcher; the folder is not refused as another run's."""
        folder = tmp_path / "run"
        # --standalone: with the static rendezvous torch 2.15 itself hangs in the second round.
        words = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "--max_restarts=1", "--log-dir", tmp_path / "log",
            ROOT / "tools" / "fault_injection.py", "kill-one-5", "cifar",
        ]  # fmt: skip
        flags = [*COMMON, *MODELS["resnet"], "-c", folder, "--overwrite"]
        result = run([*words, *flags])
        assert result.returncode == 0, result.stderr
        assert "after epoch 0, step 3" in result.stdout
        same(untouched(train, "resnet", "dist", 2), folder)

    def test_a_restart_does_not_forget_what_was_asked_for(self, train, tmp_path):
        """A worker that dies as it starts, and a folder that holds a run of the same flags."""
        folder = tmp_path / "run"
        assert train(folder, "alexnet", "serial", 1, fault="kill-8").returncode != 0
        flags = [*COMMON, *MODELS["alexnet"], "-c", folder]
        words = shlex.join(map(str, [sys.executable, ROOT / "cifar.py", *flags]))
        supervisor = [sys.executable, ROOT / "utils/launch/supervisor.py", "--max-restarts", "1"]
        for flag, code, shown in (("", 2, "holds a run already"), ("--overwrite", 0, "scratch")):
            line = f'[ "$CIFAR_RESTARTS" ] || kill -KILL $$; exec {words} {flag}'
            result = run([*supervisor, "--", "sh", "-c", line])
            assert "restart 1 of 1" in result.stderr
            assert result.returncode == code
            assert shown in result.stdout + result.stderr
            assert "continuing" not in result.stdout
        args, state = folder / "args.json", checkpoint.load(folder / checkpoint.LATEST)
        assert json.loads(args.read_text())["job"] == state["job"]
        assert re.fullmatch("[0-9a-f]{32}", state["job"])

    @pytest.mark.slow
    def test_a_reason_that_would_come_again_is_no_reason_to_restart(self, train, tmp_path):
        result = train(tmp_path / "run", "resnet", "dist", 2, fault="nan-4", restarts=2)
        assert result.returncode == 3
        assert "restart" not in result.stderr

    @pytest.mark.slow
    def test_one_rank_sees_no_file(self, train, untouched, tmp_path):
        """It gets the checkpoint from rank 0."""
        folder = tmp_path / "run"
        assert train(folder, "resnet", "dist", 2, fault="kill-10").returncode != 0
        result = train(folder, "resnet", "dist", 2, "--resume", "auto", fault="other-files")
        assert result.returncode == 0, result.stderr
        same(untouched(train, "resnet", "dist", 2), folder)


def test_the_launcher_starts_a_failed_job_again(train, untouched, tmp_path):
    """The whole way, as a user goes it: launcher.sh, and a worker killed from outside.

    Whenever the worker dies, the run ends as if nothing had been.
    """
    folder = tmp_path / "run"
    command = [
        ROOT / "launcher.sh", "-m", "resnet20", "-n", "2", "-d", "synthetic10", "--",
        *COMMON, *MODELS["resnet"], "--wd", "5e-4", "-c", folder,
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command], env=environment(), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until((folder / checkpoint.LATEST).exists, seconds=60)
        os.kill(workers_below(process.pid)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "rank 1 was ended by signal 9 (SIGKILL); restart 1 of 3" in err
    assert "continuing" in out
    same(untouched(train, "resnet", "dist", 2), folder)


def test_the_disk_of_a_run_may_really_be_full(tmp_path):
    """On a file system of two megabytes, where this user may mount one."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path])
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        folder = tmp_path / "run"
        flags = [*COMMON, *MODELS["alexnet"], "-c", str(folder)]  # 20 MB a checkpoint
        result = run([sys.executable, str(ROOT / "cifar.py"), *flags])
        assert result.returncode == 3
        assert "MiB free" in result.stdout
        assert result.stderr.count("error:") == 1
        assert not list(folder.glob("*.pth.tar"))
        assert not list(folder.glob(".*.tmp"))
        assert len((folder / "log.txt").read_text().splitlines()) == 3
    finally:
        run(["umount", tmp_path])
