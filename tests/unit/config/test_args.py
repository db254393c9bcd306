"""The command line: its flags, their defaults and spellings, and what is refused."""

import pytest

from utils.config.args import build_parser, parse_args
from utils.config.validation import warnings
from utils.errors import UserError


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
    "-h", "--help", "--version", "-a", "--arch", "--depth", "--block-name", "--cardinality",
    "--widen-factor", "--growthRate", "--growth-rate", "--compressionRate", "--compression-rate",
    "--drop", "--dropout", "--checkpoint-activations", "-d", "--dataset", "--data", "--data-url",
    "--data-archive", "--data-md5", "-j", "--workers", "--stats", "--pad-mode", "--val-split",
    "--train-size", "--test-size", "--epochs", "--start-epoch", "--train-batch",
    "--batch-per-worker", "--test-batch", "--lr", "--learning-rate", "--lr-scaling", "--schedule",
    "--gamma", "--warmup-steps", "--warmup", "--momentum", "--nesterov", "--wd", "--weight-decay",
    "--sync-bn", "--manualSeed", "--seed", "--compression", "--backward-passes-per-step",
    "--adasum", "-c", "--checkpoint", "--resume", "--save-every", "--check-replicas", "--overwrite",
    "-e", "--evaluate", "--per-class", "--estimate", "--trust-checkpoint", "--tensorboard",
    "--trace", "--no-exchange", "--gpu-id", "--amp", "--dtype", "--memory-format", "--graph",
    "--resident", "--tf32", "--compile", "--timeout", "--on-nan", "--deterministic", "--local-rank",
    "--local_rank",
}  # fmt: skip
