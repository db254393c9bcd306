"""Pieces of the program that need no training run."""

import copy
import json
import pickle
import subprocess
import sys
import threading
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from torch import nn

from models import create_model
from utils.checkpoint import format as checkpoint
from utils.checkpoint.manager import save
from utils.checkpoint.restore import load_model, load_optimizer
from utils.checkpoint.resume import LoadedCheckpoint
from utils.config.args import build_parser, parse_args
from utils.config.validation import warnings
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.metrics.meter import Meter, Metrics
from utils.metrics.plot import draw, read_log
from utils.metrics.run_log import LOG_COLUMNS, RunLog
from utils.metrics.step_times import StepTimes
from utils.runtime import memory_format, precision
from utils.training import build
from utils.training.optim import Schedule, build_optimizer, scaled_rate


class TestOptions:
    def test_defaults_are_those_of_the_scripts_that_users_come_from(self):
        options = parse_args([]).options()
        wanted = {
            "dataset": "cifar10",
            "workers": 4,
            "epochs": 300,
            "start_epoch": None,
            "train_batch": 128,
            "test_batch": 100,
            "lr": 0.1,
            "drop": None,
            "schedule": [150, 225],
            "gamma": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "checkpoint": None,
            "resume": None,
            "evaluate": False,
            "gpu_id": None,
            "arch": "resnet",
        }
        assert {name: options[name] for name in wanted} == wanted

    def test_old_and_modern_spellings_mean_the_same(self):
        old = parse_args("-a densenet --growthRate 8 --compressionRate 3 --manualSeed 7".split())
        new = parse_args("-a densenet --growth-rate 8 --compression-rate 3 --seed 7".split())
        assert old == new

    @pytest.mark.parametrize("spelling", ["--local-rank=1", "--local_rank=1"])
    def test_both_spellings_of_the_local_rank_are_accepted(self, spelling):
        assert parse_args([spelling]).hardware.local_rank == 1

    def test_the_set_of_flags_is_frozen(self):
        flags = {flag for action in build_parser()._actions for flag in action.option_strings}
        assert flags == FLAGS

    @pytest.mark.parametrize(
        ("line", "flag", "fix"),
        [
            ("--epochs 0", "--epochs", "1 or more"),
            ("--epochs 1.5", "'1.5'", "whole number"),
            ("--lr nan", "--lr", "above 0"),
            ("--lr -1", "--lr", "'-1'"),
            ("--drop 1", "--drop", "below 1"),
            ("-d cifr10", "'cifr10'", "cifar10"),
            ("--seed -3", "--seed", "0"),
            ("--evaluate", "--evaluate", "--resume"),
            ("--overwrite --resume auto", "--overwrite", "leave one out"),
            ("--train-batch 8 --batch-per-worker 8", "--batch-per-worker", "not allowed"),
            (f"-d folder --data-md5 {'0' * 32}", "--data-md5", "-d cifar10"),
            ("--start-epoch 9 --epochs 9", "--start-epoch 9", "below --epochs"),
            ("--nesterov --momentum 0", "--nesterov", "--momentum"),
            ("--amp bf16 --dtype float64", "--amp", "leave one out"),
            ("--no-such-flag", "--no-such-flag", "no such flag"),
            ("--epoch 5", "--epoch:", "did you mean --epochs?"),
            ("-epochs 5", "-epochs:", "did you mean --epochs?"),
            ("--lr 0.1 0.2", "'0.2'", "-h lists the flags"),
            ("--lr 1e9 --gamma 1e9 --schedule 1 2 3", "--gamma 1e+09", "a smaller --gamma"),
        ],
    )
    def test_bad_input_names_flag_and_fix_in_one_line(self, line, flag, fix):
        with pytest.raises(UserError) as caught:
            parse_args(line.split())
        assert flag in str(caught.value)
        assert fix in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_an_odd_schedule_is_a_warning(self):
        assert warnings(parse_args("--schedule 81 122 --epochs 164".split()).train) == []
        (line,) = warnings(parse_args("--schedule 122 81 --epochs 164".split()).train)
        assert "122 81" in line
        (line,) = warnings(parse_args("--schedule 81 122 --epochs 100".split()).train)
        assert "past --epochs 100" in line


FLAGS = {
    "-h", "--help", "-a", "--arch", "--depth", "--block-name", "--cardinality", "--widen-factor",
    "--growthRate", "--growth-rate", "--compressionRate", "--compression-rate", "--drop",
    "--dropout", "--checkpoint-activations", "-d", "--dataset", "--data", "--data-url",
    "--data-archive", "--data-md5", "-j", "--workers", "--stats", "--pad-mode", "--val-split",
    "--train-size", "--test-size", "--epochs", "--start-epoch", "--train-batch",
    "--batch-per-worker", "--test-batch", "--lr", "--learning-rate", "--lr-scaling", "--schedule",
    "--gamma", "--warmup-steps", "--warmup", "--momentum", "--nesterov", "--wd", "--weight-decay",
    "--sync-bn", "--manualSeed", "--seed", "--compression", "--backward-passes-per-step",
    "--adasum", "-c", "--checkpoint", "--resume", "--save-every", "--check-replicas",
    "--overwrite", "-e", "--evaluate", "--per-class", "--estimate", "--trust-checkpoint",
    "--tensorboard", "--trace", "--no-exchange", "--gpu-id", "--amp", "--dtype",
    "--memory-format", "--graph", "--resident", "--tf32", "--compile", "--timeout",
    "--on-nan", "--deterministic", "--local-rank", "--local_rank",
}  # fmt: skip


class TestLearningRate:
    def test_decays_at_the_scheduled_epochs(self):
        schedule = Schedule(0.1, [81, 122], 0.1)
        rates = [schedule.learning_rate(epoch, 0, 391) for epoch in (0, 80, 81, 121, 122, 163)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])

    def test_warms_up_for_exactly_the_given_steps(self):
        constant = Schedule(0.1, [10], 0.1, warmup_steps=400)
        assert constant.learning_rate(0, 0, 391) == pytest.approx(0.01)
        assert constant.learning_rate(1, 8, 391) == pytest.approx(0.01)
        assert constant.learning_rate(1, 9, 391) == pytest.approx(0.1)
        linear = Schedule(1.0, [10], 0.1, warmup_steps=100, warmup="linear")
        rates = [linear.learning_rate(0, k, 391) for k in (0, 50, 100)]
        assert rates == pytest.approx([0.1, 0.55, 1.0])

    def test_scaling_is_relative_to_128_images(self):
        assert scaled_rate(0.1, 512, "none") == 0.1
        assert scaled_rate(0.1, 512, "linear") == pytest.approx(0.4)
        assert scaled_rate(0.1, 512, "sqrt") == pytest.approx(0.2)


def test_a_meter_counts_images_not_batches():
    meter = Meter(torch.device("cpu"))
    right = torch.eye(10)[:4] * 5
    meter.update(torch.tensor(8.0), right, torch.arange(4))
    wrong = -torch.eye(10)[9:] * 5
    meter.update(torch.tensor(7.0), wrong, torch.tensor([9]))
    assert meter.reduced(Comm()) == Metrics(loss=3.0, top1=80.0, top5=80.0, images=5)


class TestCheckpoint:
    def state(self, model: nn.Module) -> dict:
        return {"epoch": 3, "state_dict": model.state_dict(), "acc": 1.0, "best_acc": 2.0}

    def test_what_is_saved_comes_back_and_no_temporary_file_stays(self, tmp_path):
        model = create_model("alexnet")
        save(tmp_path, self.state(model), is_best=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.LATEST, checkpoint.BEST]
        for name in (checkpoint.LATEST, checkpoint.BEST):
            state = checkpoint.load(tmp_path / name)
            assert state["epoch"] == 3
            fresh = create_model("alexnet")
            load_model(fresh, state, tmp_path / name, "alexnet")
            assert torch.equal(fresh.classifier.weight, model.classifier.weight)

    def test_a_failed_save_leaves_the_previous_checkpoint(self, tmp_path):
        save(tmp_path, self.state(create_model("alexnet")), is_best=False)
        before = (tmp_path / checkpoint.LATEST).read_bytes()
        with pytest.raises(Exception, match="pickle"):
            save(tmp_path, {"unpicklable": threading.Lock()}, is_best=False)
        assert (tmp_path / checkpoint.LATEST).read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1

    def test_wrapper_prefixes_and_missing_batch_counters_load(self, tmp_path):
        model = create_model("resnet", depth=8)
        old = {
            f"module.{name}": tensor
            for name, tensor in model.state_dict().items()
            if "num_batches" not in name
        }
        path = tmp_path / "old.pth.tar"
        torch.save({"state_dict": old, "epoch": 1}, path)
        fresh = create_model("resnet", depth=8)
        load_model(fresh, checkpoint.load(path), path, "resnet")
        assert torch.equal(fresh.layer3[0].conv1.weight, model.layer3[0].conv1.weight)

    def test_a_file_in_the_format_of_old_torch_loads(self, tmp_path):
        path = tmp_path / "old.pth.tar"
        torch.save(self.state(create_model("alexnet")), path, _use_new_zipfile_serialization=False)
        assert checkpoint.load(path)["best_acc"] == 2.0

    def test_another_network_is_named(self, tmp_path):
        path = tmp_path / "resnet.pth.tar"
        torch.save(self.state(create_model("resnet", depth=20)), path)
        with pytest.raises(UserError, match=r"holds resnet \(depth 20.*not alexnet") as caught:
            load_model(
                create_model("alexnet"), checkpoint.load(path), path, "alexnet (num_classes 10)"
            )
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
    def test_a_truncated_file_is_bad_input(self, tmp_path, share):
        path = tmp_path / "cut.pth.tar"
        torch.save(self.state(create_model("alexnet")), path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(UserError, match=r"cut\.pth\.tar: not a readable checkpoint"):
            checkpoint.load(path)

    def test_code_in_a_file_is_not_run(self, tmp_path):
        marker = tmp_path / "marker"

        class Payload:
            def __reduce__(self):
                return (open, (str(marker), "w"))

        for name, write in (("zip", torch.save), ("plain", pickle.dump)):
            path = tmp_path / name
            with path.open("wb") as file:
                write({"state_dict": Payload()}, file)
            with pytest.raises(UserError, match="not a readable checkpoint"):
                checkpoint.load(path)
        assert not marker.exists()

    def test_a_trusted_file_may_hold_more_than_plain_values(self, tmp_path):
        """Old scripts pickled their options along."""
        path = tmp_path / "old.pth.tar"
        torch.save({**self.state(create_model("alexnet")), "args": Namespace(lr=0.1)}, path)
        with pytest.raises(UserError, match="--trust-checkpoint"):
            checkpoint.load(path)
        assert checkpoint.load(path, trust=True)["args"].lr == 0.1

    def test_optimizer_state_of_another_network_is_refused(self, tmp_path):
        def trained(model):
            optimizer = build_optimizer(model, 0.1, 0.9, 0, False)
            model(torch.zeros(2, 3, 32, 32)).sum().backward()
            optimizer.step()
            return optimizer

        saved = {"optimizer": trained(create_model("vgg11")).state_dict()}
        fresh = build_optimizer(create_model("alexnet"), 0.1, 0.9, 0, False)
        with pytest.raises(UserError, match="optimizer"):
            load_optimizer(fresh, saved, tmp_path / "x")

    def test_the_settings_of_the_command_line_win_over_the_files(self, tmp_path):
        saved = build_optimizer(nn.Linear(2, 2), 0.1, 0.9, 1e-4, False).state_dict()
        fresh = build_optimizer(nn.Linear(2, 2), 0.2, 0.8, 5e-4, True)
        assert load_optimizer(fresh, {"optimizer": saved}, tmp_path)
        (group,) = fresh.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.8, 5e-4)
        assert group["nesterov"]


class TestRunLog:
    def write(self, folder, first, last):
        log = RunLog(folder, first)
        for epoch in range(first, last):
            train = Metrics(2.0 / (epoch + 1), 50.0 + epoch, 90.0, 1000)
            log.epoch(epoch + 1, 0.1, train, train, seconds=2.0)
        log.close()

    def test_a_row_an_epoch_in_the_familiar_format(self, tmp_path):
        self.write(tmp_path, 0, 3)
        lines = (tmp_path / "log.txt").read_text().splitlines()
        assert lines[0].split("\t") == list(LOG_COLUMNS)
        assert lines[1] == "0.100000\t2.000000\t2.000000\t50.000000\t50.000000"
        records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [r["epoch"] for r in records] == [1, 2, 3]
        assert records[0]["images_per_second"] == 500.0

    def test_resuming_cuts_off_the_epochs_that_are_trained_again(self, tmp_path):
        self.write(tmp_path, 0, 5)
        untouched = (tmp_path / "log.txt").read_text()
        self.write(tmp_path, 2, 5)
        assert (tmp_path / "log.txt").read_text() == untouched
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5

    def test_curves_of_several_runs_are_drawn_over_each_other(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            self.write(tmp_path / name, 0, 3)
        logs = [str(tmp_path / name / "log.txt") for name in ("a", "b")]
        picture = tmp_path / "compare.png"
        command = [sys.executable, "-m", "utils.plot", *logs, "-o", str(picture)]
        subprocess.run(command, check=True, timeout=60)
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_an_empty_log_can_be_drawn_and_another_file_is_refused(self, tmp_path):
        self.write(tmp_path, 0, 0)
        draw({"run": read_log(tmp_path / "log.txt")}, tmp_path / "log.png")
        (tmp_path / "other.txt").write_text("a b c\n1\n")
        with pytest.raises(UserError, match=r"other\.txt"):
            read_log(tmp_path / "other.txt")


def test_the_serial_engine_refuses_adasum():
    model = nn.Linear(1, 1)
    sync = parse_args(["--adasum"]).gradient_sync
    with pytest.raises(UserError, match="Horovod"):
        Comm().prepare(model, build_optimizer(model, 0.1, 0, 0, False), sync)


class TestPrecision:
    @pytest.mark.parametrize("works", [True, False])
    def test_bf16_that_the_processor_cannot_compute_makes_a_new_configuration(
        self, monkeypatch, capsys, works
    ):
        monkeypatch.setattr(precision, "_cpu_runs_bf16", lambda: works)
        asked = parse_args(["--amp", "bf16"]).hardware
        found = precision.resolve_precision(asked, Comm())
        assert asked.amp == "bf16"
        assert found.amp == ("bf16" if works else "off")
        assert replace(found, amp="bf16") == asked
        assert capsys.readouterr().out.count("warning: --amp bf16: ") == (not works)

    def test_without_bf16_nothing_is_tried(self, monkeypatch):
        monkeypatch.setattr(precision, "_cpu_runs_bf16", lambda: pytest.fail("tried"))
        hardware = parse_args([]).hardware
        assert precision.resolve_precision(hardware, Comm()) is hardware


class TestMemoryFormat:
    def test_is_tried_once_and_remembered(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        model = create_model("resnet", depth=8)
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        first = memory_format.choose_memory_format("resnet-8", model, 10**6, "off", Comm())
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        (answers,) = tmp_path.rglob("memory-format.json")
        (key,) = json.loads(answers.read_text())
        assert key.startswith("resnet-8 | torch.float32")
        monkeypatch.setattr(memory_format, "_try", lambda *_: pytest.fail("tried again"))
        assert memory_format.choose_memory_format("resnet-8", model, 10**6, "off", Comm()) == first

    def test_a_damaged_memory_or_none_is_no_obstacle(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        model = create_model("alexnet")
        path = tmp_path / "cifar-allreduce" / "memory-format.json"
        path.parent.mkdir()
        path.write_text("[1, 2")
        assert (
            memory_format.choose_memory_format("alexnet", model, 10**6, "off", Comm())
            in memory_format.FORMATS
        )
        assert len(json.loads(path.read_text())) == 1
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
        assert (
            memory_format.choose_memory_format("alexnet", model, 10**6, "off", Comm())
            in memory_format.FORMATS
        )

    @pytest.mark.parametrize(
        ("line", "saved", "wanted"),
        [
            ("--memory-format channels_last", "contiguous", "channels_last"),
            ("--epochs 300", "channels_last", "channels_last"),
            ("--epochs 300 --deterministic", None, "contiguous"),
            ("--epochs 1", None, "contiguous"),  # 1,000 images are not worth a trial
        ],
    )
    def test_the_command_line_and_the_checkpoint_come_first(self, line, saved, wanted, tmp_path):
        config = parse_args(["-a", "alexnet", "-d", "synthetic10", *line.split()])
        config = config.replace(data=replace(config.data, train_size=1000, test_size=10))
        comm = Comm()
        loaded = None
        if saved:
            state = {"memory_format": saved, "state_dict": create_model("alexnet").state_dict()}
            loaded = LoadedCheckpoint(tmp_path / "file", state)
        dataset = build.dataset(config.data)
        splits = build.splits(dataset, config, comm)
        _, found = build.model(config, dataset, splits, loaded, comm)
        assert found == wanted
        assert splits.train.memory_format == memory_format.FORMATS[wanted]

    def test_momentum_is_laid_out_like_its_parameter(self, tmp_path):
        model = nn.Conv2d(3, 4, 3)
        optimizer = build_optimizer(model, 0.1, 0.9, 0, False)
        model(torch.ones(1, 3, 8, 8)).sum().backward()
        optimizer.step()
        other = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        fresh = build_optimizer(other, 0.1, 0.9, 0, False)
        load_optimizer(fresh, {"optimizer": optimizer.state_dict()}, tmp_path)
        momentum = fresh.state[other.weight]["momentum_buffer"]
        assert momentum.stride() == other.weight.stride()
        assert torch.equal(momentum, optimizer.state[model.weight]["momentum_buffer"])


def test_a_run_that_has_no_step_left_writes_an_empty_trace(tmp_path):
    """As of one that a signal has stopped behind its last step, and that is resumed."""
    StepTimes(keep=True).write(tmp_path / "trace.json", Comm())
    assert json.loads((tmp_path / "trace.json").read_text())["loss"] == []
