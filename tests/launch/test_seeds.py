"""launcher.sh --seeds: one training for each seed, gone on with where it was interrupted."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from functools import partial

import pytest

from helpers.process import environment, wait_until
from helpers.process import run as run_command
from tools import seeds
from tools.seeds import Run, Trainings
from utils.errors import UserError
from utils.files import ROOT
from utils.launch.options import Options, check_job, read_options
from utils.launch.processes import end_with_parent

SMALL = "--epochs 3 --train-size 1280 --test-size 64 --lr 0.01 -c runs".split()
COMMAND = ["bash", ROOT / "launcher.sh", "-m", "alexnet", "-d", "synthetic10", "--seeds", "0-1"]


def rows(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.timeout(500)
def test_seeds_are_trained_and_gone_on_with_after_a_kill(tmp_path):
    """Killed inside the second seed, together with whatever it has started."""
    words = [str(word) for word in [*COMMAND, "--", *SMALL]]
    with (tmp_path / "output").open("w") as output:
        first = subprocess.Popen(
            words, cwd=tmp_path, env=environment(), stdout=output, stderr=output
        )
    try:
        wait_until(lambda: rows(tmp_path / "runs" / "seed1"), seconds=100)
    finally:
        first.kill()
        first.wait()
    assert len(rows(tmp_path / "runs" / "seed0")) == 3
    lock = tmp_path / "runs" / "seed1" / ".lock"
    wait_until(lambda: not lock.exists(), seconds=60)  # Its launcher saves and stops.
    assert len(rows(tmp_path / "runs" / "seed1")) < 3
    before = (tmp_path / "runs" / "seed0" / "metrics.jsonl").stat().st_mtime_ns

    result = run_command(words, cwd=tmp_path, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "seed 0: is trained already" in result.stdout
    assert "continuing runs/seed1/checkpoint.pth.tar" in result.stdout
    assert (tmp_path / "runs" / "seed0" / "metrics.jsonl").stat().st_mtime_ns == before
    last = [rows(tmp_path / "runs" / f"seed{seed}")[-1]["valid_top1"] for seed in (0, 1)]
    mean, deviation = statistics.fmean(last), statistics.stdev(last)
    wanted = (
        f"alexnet on synthetic10, test accuracy, n = 2: last {mean:.2f} ± {deviation:.2f} %, best "
    )
    assert result.stdout.splitlines()[-1].startswith(wanted)

    # Everything is trained, and what is asked for now is another training.
    for more, parts in (
        (["--lr", "0.02"], ("--lr 0.01", "--lr 0.02")),
        (["-d", "synthetic100"], ("--dataset synthetic10", "--dataset synthetic100")),
    ):
        other = run_command([*words, *more], cwd=tmp_path)
        assert other.returncode == 2
        (line,) = other.stderr.splitlines()
        for part in ("runs/seed0", *parts):
            assert part in line


def job(*words, visible=None):
    options = read_options(["-m", "alexnet", "-d", "synthetic10", "--seeds", "0-3", *words])
    return options, check_job(options, visible)


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--seed", "3"], "--seed"), (["--manualSeed=3"], "--manualSeed=3"),
     (["--resume", "x.pth.tar"], "--resume x.pth.tar"), (["--estimate"], "--estimate"),
     (["--trace", "x"], "--trace"), (["-e", "--resume", "auto"], "-e"), (["-h"], "-h"),
     (["--overwrite"], "--overwrite"), (["--start-epoch", "1"], "--start-epoch"),
     (["--lr", "x"], "--lr"), (["--no-such"], "--no-such")],
)  # fmt: skip
def test_flags_that_do_not_go_with_several_seeds_are_refused(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        seeds.common_config(job("--", *flags)[1])


@pytest.mark.parametrize(
    ("words", "visible", "places"),
    [([], None, ["0", "1", "2", "3"]), (["-n", "2"], None, ["0,1", "2,3"]),
     (["-n", "3"], None, ["0,1,2"]), (["-g", "3,1"], None, ["3", "1"]),
     ([], "1, 2", ["1", "2"]), ([], "GPU-aa,GPU-bb", ["GPU-aa", "GPU-bb"]), ([], "", None),
     ([], "-1", None), ([], "0,-1,1", ["0", "1"]), (["-n", "2"], "-1", None)],
)  # fmt: skip
def test_one_seed_is_trained_per_gpu(monkeypatch, words, visible, places):
    monkeypatch.setattr("utils.launch.options.gpu_count", lambda: 4)
    monkeypatch.setattr("tools.seeds.core_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    options, found = job(*words, visible=visible)
    slots = seeds.slots_of(found, options, 8)
    if places is None:
        assert slots == [{}]
        return
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == places
    threads = {int(slot["OMP_NUM_THREADS"]) for slot in slots}
    assert threads == {16 // (len(places) * found.workers)}
    (slot,) = seeds.slots_of(found, options, 1)
    assert slot["CUDA_VISIBLE_DEVICES"] == places[0]
    assert int(slot["OMP_NUM_THREADS"]) == 16 // found.workers


def test_without_a_gpu_one_seed_is_trained_after_the_other(monkeypatch):
    monkeypatch.setattr("utils.launch.options.gpu_count", lambda: 0)
    options, found = job()
    assert seeds.slots_of(found, options, 8) == [{}]
    assert found.workers == 1


def test_a_seed_has_its_own_flags_and_the_launcher_all_others(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options, found = job("-n", "2", "--max-restarts", "5", "--", "--lr", "0.3")
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: started.append((words, more)))
    run = Run(2, tmp_path / "seed2")
    seeds.launch(options, found, run, {"CUDA_VISIBLE_DEVICES": "1"}, True)
    ((((_, _, *words),), more),) = started
    assert more["env"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert more["stdout"] is None
    one = read_options(words)
    assert one == Options(
        model="alexnet", workers="2", dataset="synthetic10", restarts="5",
        flags=("--lr", "0.3", "--seed", "2", "-c", str(run.folder), "--resume", "auto"),
    )  # fmt: skip


def test_the_gpus_of_hosts_are_left_to_the_launcher(monkeypatch, tmp_path):
    monkeypatch.setattr("utils.launch.options.gpu_count", lambda: 4)
    more = ("-f", "horovod", "-n", "2", "-g", "2,3", "--hosts", "localhost:2")
    options, found = job(*more)
    slots = seeds.slots_of(found, options, 8)
    assert slots == [{}]
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.extend(words))
    seeds.launch(options, found, Run(0, tmp_path / "seed0"), slots[0], True)
    one = read_options(started[2:])
    assert (one.gpus, one.hosts, one.workers) == ("2,3", "localhost:2", "2")


def test_a_place_for_output_that_cannot_be_had_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("utils.launch.options.gpu_count", lambda: 4)
    words = ["-m", "alexnet", "-d", "synthetic10", "--seeds", "0-3", "--", "-c", "/proc/none"]
    monkeypatch.setattr(sys, "argv", ["seeds", *words])
    monkeypatch.setattr(subprocess, "Popen", None)
    assert seeds.main() == 2


class Shells:
    """Launchers for Trainings: programs of a line each, by seed."""

    def __init__(self, folder, **programs):
        self.programs = programs
        self.folder = folder
        self.places = []

    def __call__(self, run, slot, alone):
        self.places.append((run.seed, slot, alone))
        return subprocess.Popen(
            ["sh", "-c", self.programs.get(f"s{run.seed}", "exit 0")],
            preexec_fn=partial(end_with_parent, signal.SIGKILL, os.getpid()),
        )

    def train(self, count, slots):
        """Return the seeds that were started, and the exit code of the whole."""
        runs = [Run(seed, self.folder / f"seed{seed}") for seed in range(count)]
        handlers = {n: signal.getsignal(n) for n in (*seeds.STOP_SIGNALS, signal.SIGUSR2)}
        trainings = Trainings(runs, slots, self)
        try:
            trainings.run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return [seed for seed, _, _ in self.places], trainings.exit_code()


@pytest.mark.parametrize("code", [1, 3, 137])
def test_a_seed_that_fails_leaves_the_others_alone(tmp_path, capsys, code):
    assert Shells(tmp_path, s1=f"exit {code}").train(3, [{}]) == ([0, 1, 2], 3)
    assert f"seed 1: has ended with exit code {code}" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "whole"), [(2, 2), (75, 75), (143, 75), (130, 75)])
def test_nothing_more_is_started_after_bad_input_or_a_stop(tmp_path, code, whole):
    assert Shells(tmp_path, s1=f"exit {code}").train(4, [{}]) == ([0, 1], whole)


def test_seeds_share_the_gpus(tmp_path):
    """The one of the first seed stays its own; the other takes those that are left."""
    last = tmp_path / "last"
    shells = Shells(tmp_path, s0=f"until [ -e {last} ]; do sleep 0.05; done", s3=f"touch {last}")
    assert shells.train(4, [{"gpu": "0"}, {"gpu": "1"}]) == ([0, 1, 2, 3], 0)
    assert [slot["gpu"] for _, slot, _ in shells.places] == ["0", "1", "1", "1"]
    assert not any(alone for _, _, alone in shells.places)


PROGRAM = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from launch.test_seeds import Shells
from pathlib import Path
wait = "trap 'exit 75' TERM; trap 'echo saved' USR2; echo ready; while :; do sleep 0.1; done"


class Interrupted(Shells):
    def __call__(self, run, slot, alone):
        process = super().__call__(run, slot, alone)
        if {early} and run.seed == 1:  # before anything knows of the process
            os.kill(os.getpid(), signal.SIGTERM)
        return process


print(Interrupted(Path("."), s0=wait, s1=wait).train(3, [{{}}, {{}}]))
"""


@pytest.fixture
def two_launchers(tmp_path):
    """Starts two that wait for signals, and a third that may not start."""
    started = []

    def start(early=False):
        program = PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), early=early)
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", program], cwd=tmp_path, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_signals_are_passed_on_to_every_launcher(two_launchers):
    process = two_launchers()
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGUSR2)
    assert [process.stdout.readline() for _ in range(2)] == ["saved\n"] * 2
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert out.splitlines()[-1] == "([0, 1], 75)", err


def test_a_signal_reaches_a_launcher_that_is_just_being_started(two_launchers):
    out, err = two_launchers(early=True).communicate(timeout=20)
    assert out.splitlines()[-1] == "([0, 1], 75)", err


def test_a_request_to_save_does_not_end_a_launcher_that_starts(tmp_path):
    """It is ignored until there is something to save; the launcher then handles it."""
    started = subprocess.Popen(
        ["sh", "-c", "kill -USR2 $$; echo alive"], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: seeds._prepare_launcher(os.getppid()),
    )  # fmt: skip
    assert started.communicate(timeout=20)[0] == "alive\n"
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import signal; from utils.launch.supervisor import Requests\n"
        "signal.signal(signal.SIGUSR2, signal.SIG_IGN); found = Requests()\n"
        "signal.raise_signal(signal.SIGUSR2); print(found.save_count)"
    )
    result = run_command([sys.executable, "-c", program], cwd=tmp_path)
    assert result.stdout == "1\n", result.stderr


def test_the_report_counts_whole_seeds_only(tmp_path):
    runs = [Run(seed, tmp_path / f"seed{seed}") for seed in range(4)]
    logs = [50.0, 61.0, 60.0], [50.0, 62.0, 62.0], [40.0]
    for run, accuracies in zip(runs, logs, strict=False):
        run.folder.mkdir()
        lines = [
            json.dumps({"epoch": epoch, "valid_top1": accuracy, "seconds": 1.0})
            for epoch, accuracy in enumerate(accuracies, 1)
        ]
        # The last line is that of a disk that was full.
        (run.folder / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch":']))
    lines = seeds.report(runs, 3, "resnet20 on cifar10", goes_on=True).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["0", "3", "60.00", "61.00", "(epoch", "2)"],
        ["1", "3", "62.00", "62.00", "(epoch", "2)"],
        ["2", "1", "40.00", "40.00", "(epoch", "1)"],
        ["3", "0"],
    ]
    assert lines[5] == "resnet20 on cifar10, n = 2: last 61.00 ± 1.41 %, best 61.50 ± 0.71 %"
    assert lines[6] == "2 of 4 seeds are trained to their end; the same command goes on"
    *_, line = seeds.report(runs, 3, "resnet20 on cifar10", goes_on=False).splitlines()
    assert line == "2 of 4 seeds are trained to their end"


def test_a_folder_of_another_training_is_refused(tmp_path):
    _, found = job("--", *SMALL)
    config = seeds.common_config(found)
    run = Run(1, tmp_path)
    for changes, words in (
        ({}, None), ({"seed": 2}, "--seed 2"), ({"data_md5": "0" * 32}, "--data-md5"),
        ({"dataset": "folder", "data": "elsewhere"}, "--data elsewhere"),
    ):  # fmt: skip
        record = {"options": {**config.options(), "seed": 1, **changes}}
        (tmp_path / "args.json").write_text(json.dumps(record))
        if words:
            with pytest.raises(UserError, match=words):
                seeds.unfinished([run], found, config)
        else:
            assert seeds.unfinished([run], found, config) == [run]
    whole = {"options": {**config.options(), "seed": 1}}
    for earlier, words in (
        ({"options": {**whole["options"], "epochs": 1}}, None),  # It got more.
        ({"options": {**whole["options"], "lr": 0.3}}, "--lr 0.3"),
        ({"options": {}, "file": "best.safetensors"}, "--seed None"),
    ):
        (tmp_path / "args.json").write_text(json.dumps({**whole, "earlier": [earlier]}))
        if words:
            with pytest.raises(UserError, match=words):
                seeds.unfinished([run], found, config)
        else:
            assert seeds.unfinished([run], found, config) == [run]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_folder_is_left_to_resuming(tmp_path, text):
    _, found = job("--", *SMALL)
    (tmp_path / "args.json").write_text(text)
    run = Run(1, tmp_path)
    assert seeds.unfinished([run], found, seeds.common_config(found)) == [run]
