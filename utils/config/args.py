"""The command line: flags with their defaults, and what is wrong with a combination of them.

Spellings and defaults are those of bearpaw/pytorch-classification, so that its commands run
unchanged; a modern spelling is accepted beside each camel-case one.
"""

import argparse
import difflib
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from models import list_models
from utils.data.datasets import DATASETS
from utils.errors import UserError, one_line

# Flags that go to the model's factory, as spelled on the command line. Unset, they leave the
# model's own default in force.
MODEL_FLAGS = {
    "depth": "--depth",
    "cardinality": "--cardinality",
    "widen_factor": "--widen-factor",
    "growth_rate": "--growthRate",
    "compression_rate": "--compressionRate",
    "drop": "--drop",
    "block_name": "--block-name",
    "checkpoint_activations": "--checkpoint-activations",
}


class _Parser(argparse.ArgumentParser):
    """Reports bad input the way the rest of the program does: as a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(one_line(message.removeprefix("argument "), most=250))


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        unset = action.default is None or isinstance(action.default, bool | list)
        if unset or action.default == argparse.SUPPRESS or "default" in text:
            return text
        return text + " (default: %(default)s)"


# int() and float() also take 1_000, full-width digits, spaces around and, the latter, nan and inf.
_WHOLE = re.compile(r"0*([0-9]{1,10})")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _whole_number(least: int, most: int = 10**9) -> Callable[[str], int]:
    def parse(text: str) -> int:
        digits = _WHOLE.fullmatch(text)
        value = int(digits[1]) if digits else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give a whole number of {least} or more (at most {most})"
            )
        return value

    return parse


def _real_number(
    least: float, *, open_: bool = False, below: float | None = None, most: float = 1e9
) -> Callable[[str], float]:
    limit = f"{'above' if open_ else 'of at least'} {least:g} "
    limit += f"(at most {most:g})" if below is None else f"and below {below:g}"

    def parse(text: str) -> float:
        value = float(text) if _REAL.fullmatch(text) else math.nan
        high_enough = value > least or (value == least and not open_)
        if not high_enough or not value <= most or (below is not None and value >= below):
            raise argparse.ArgumentTypeError(f"{text!r}: give a number {limit}")
        return value

    return parse


def _path(text: str) -> str:
    """A path that files can have and that a line can show."""
    if not text:
        raise argparse.ArgumentTypeError("'': empty; give a path or leave the flag out")
    # Control characters, bytes that are no UTF-8, ends of lines and paragraphs.
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: holds a character that cannot be printed; give another name"
        )
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise argparse.ArgumentTypeError(f"{text!r}: longer than names of files can be")
    return text


def _matching(pattern: str, what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise argparse.ArgumentTypeError(f"{text!r}: give {what}")

    return parse


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text.lower(), names, n=3)
        fix = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"{text!r}: {fix}")

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The parser with every flag, in groups."""
    parser = _Parser(
        description="Train CIFAR-10/100 classifiers with data-parallel all-reduce.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _add_model_flags(parser.add_argument_group("model (unset flags leave the model's own value)"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_exchange_flags(parser.add_argument_group("gradient exchange"))
    _add_run_flags(parser.add_argument_group("run folder, resume, evaluate"))
    _add_hardware_flags(parser.add_argument_group("hardware and precision"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    names = list_models()
    group.add_argument(
        "-a", "--arch", type=_one_of(names), default="resnet", metavar="NAME",
        help="architecture: " + ", ".join(names),
    )  # fmt: skip
    group.add_argument(
        "--depth", type=_whole_number(1, 3000), metavar="N",
        help="layers (default: resnet and preresnet 20, resnext 29, wrn 28, densenet 100)",
    )  # fmt: skip
    group.add_argument(
        "--block-name", metavar="NAME",
        help="resnet, preresnet: BasicBlock or bottleneck (default: BasicBlock)",
    )  # fmt: skip
    group.add_argument(
        "--cardinality", type=_whole_number(1, 1000), metavar="N",
        help="resnext: groups (default: 8)",
    )  # fmt: skip
    group.add_argument(
        "--widen-factor", type=_whole_number(1, 1000), metavar="N",
        help="resnext, wrn: width multiplier (default: 4)",
    )  # fmt: skip
    group.add_argument(
        "--growthRate", "--growth-rate", dest="growth_rate",
        type=_whole_number(1, 1000), metavar="N",
        help="densenet: channels that each layer adds (default: 12)",
    )  # fmt: skip
    group.add_argument(
        "--compressionRate", "--compression-rate", dest="compression_rate",
        type=_whole_number(1, 1000), metavar="N",
        help="densenet: transitions divide the channels by this (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--drop", "--dropout", dest="drop", type=_real_number(0, below=1), metavar="P",
        help="wrn, densenet: dropout probability (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint-activations", action="store_const", const=True,
        help="resnet, densenet: compute activations again in backward: less memory, more time",
    )  # fmt: skip


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-d", "--dataset", type=_one_of(DATASETS), default="cifar10", metavar="NAME",
        help="one of " + ", ".join(DATASETS),
    )  # fmt: skip
    group.add_argument(
        "--data", type=_path, default="data", metavar="DIR",
        help="where the archives lie or are downloaded to; for -d folder the folder that holds "
        "train/<class>/ and test/<class>/",
    )  # fmt: skip
    group.add_argument(
        "--data-url", action="append", default=[], metavar="URL",
        type=_matching("https?://[!-~]+", "an address such as https://host/folder/"),
        help="mirror of the CIFAR archive, tried before the official address; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--data-archive", type=_path, metavar="FILE",
        help="CIFAR archive on disk: nothing is downloaded",
    )  # fmt: skip
    group.add_argument(
        "--data-md5", type=_matching("[0-9a-fA-F]{32}", "the 32 hex digits of an md5"),
        metavar="HEX", help="md5 of the archive, where a mirror's file differs",
    )  # fmt: skip
    group.add_argument(
        "-j", "--workers", type=_whole_number(1, 1000), default=4, metavar="N",
        help="threads that decode a folder of images once; training itself needs none",
    )  # fmt: skip
    group.add_argument(
        "--stats", choices=("true", "legacy"), default="true",
        help="normalise with the data set's true mean and standard deviation, or with the "
        "widespread 0.2023 0.1994 0.2010",
    )  # fmt: skip
    group.add_argument(
        "--pad-mode", choices=("zero", "reflect"), default="zero",
        help="border that random crops reach into",
    )  # fmt: skip
    group.add_argument(
        "--val-split", type=_whole_number(1), metavar="N",
        help="hold out N training images and select the best epoch on them, not on the test set",
    )  # fmt: skip
    group.add_argument(
        "--train-size", type=_whole_number(1), metavar="N",
        help="train on N images only (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--test-size", type=_whole_number(1), metavar="N",
        help="test on N images only (default: all)",
    )  # fmt: skip


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs", type=_whole_number(1), default=300, metavar="N", help="epochs in all"
    )
    group.add_argument(
        "--start-epoch", type=_whole_number(0), metavar="N",
        help="first epoch, counted from 0 (default: where the checkpoint stands)",
    )  # fmt: skip
    batch = group.add_mutually_exclusive_group()
    batch.add_argument(
        "--train-batch", type=_whole_number(1, 10**6), default=128, metavar="N",
        help="global batch: images per step over all workers",
    )  # fmt: skip
    batch.add_argument(
        "--batch-per-worker", type=_whole_number(1, 10**6), metavar="N",
        help="the other spelling: images per step and worker",
    )  # fmt: skip
    group.add_argument(
        "--test-batch", type=_whole_number(1, 10**6), default=100, metavar="N",
        help="images per forward pass in evaluation; does not change the result",
    )  # fmt: skip
    group.add_argument(
        "--lr", "--learning-rate", dest="lr", type=_real_number(0, open_=True), default=0.1,
        metavar="RATE", help="learning rate at the start",
    )  # fmt: skip
    group.add_argument(
        "--lr-scaling", choices=("none", "linear", "sqrt"), default="none",
        help="multiply --lr by (global batch / 128), by its root, or not at all",
    )  # fmt: skip
    group.add_argument(
        "--schedule", type=_whole_number(0), nargs="+", default=[150, 225], metavar="EPOCH",
        help="epochs at which the learning rate is multiplied by --gamma (default: 150 225)",
    )  # fmt: skip
    group.add_argument(
        "--gamma", type=_real_number(0, open_=True), default=0.1, metavar="X",
        help="factor on the learning rate at each --schedule epoch",
    )  # fmt: skip
    group.add_argument(
        "--warmup-steps", type=_whole_number(0), default=0, metavar="N",
        help="steps at the start with a smaller learning rate",
    )  # fmt: skip
    group.add_argument(
        "--warmup", choices=("constant", "linear"), default="constant",
        help="warm up at a tenth of the learning rate, or rise from a tenth to all of it",
    )  # fmt: skip
    group.add_argument(
        "--momentum", type=_real_number(0, below=1), default=0.9, metavar="X", help="momentum"
    )
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum")
    group.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=_real_number(0), default=5e-4,
        metavar="X", help="weight decay",
    )  # fmt: skip
    group.add_argument(
        "--sync-bn", action="store_true",
        help="batch norm over the global batch instead of each worker's share",
    )  # fmt: skip
    group.add_argument(
        "--on-nan", choices=("stop", "skip", "rewind"), default="stop",
        help="when a loss or gradient is not finite: stop; leave the step out; or go back to the "
        "last checkpoint and leave out the steps since",
    )  # fmt: skip
    group.add_argument(
        "--manualSeed", "--seed", dest="seed", type=_whole_number(0, 2**32 - 1), default=0,
        metavar="N", help="seed of initial weights, order, augmentation and dropout",
    )  # fmt: skip


def _add_exchange_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compression", choices=("none", "fp16"), default="none",
        help="send gradients as they are, or at half precision (the results differ a little)",
    )  # fmt: skip
    group.add_argument(
        "--backward-passes-per-step", type=_whole_number(1), default=1, metavar="N",
        help="cut each worker's share into N passes and exchange the sum of their gradients: "
        "the same global batch in less memory",
    )  # fmt: skip
    group.add_argument(
        "--adasum", action="store_true",
        help="Horovod with MPI only: combine gradients by Adasum instead of the average",
    )  # fmt: skip
    group.add_argument(
        "--check-replicas", type=_whole_number(1), metavar="STEPS",
        help="compare all workers' parameters every so many steps (default: once an epoch)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=_real_number(0, open_=True), default=600.0, metavar="SECONDS",
        help="end the run when no worker goes on for so long",
    )  # fmt: skip
    # For measurements: the same work without communication.
    group.add_argument("--no-exchange", action="store_true", help=argparse.SUPPRESS)


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-c", "--checkpoint", type=_path, metavar="DIR",
        help="run folder (default: checkpoints/<dataset>/<recipe>, or that of --resume FILE)",
    )  # fmt: skip
    group.add_argument(
        "--resume", type=_path, metavar="FILE|auto",
        help="continue from a checkpoint; auto: from the newest in the run folder, if any",
    )  # fmt: skip
    group.add_argument(
        "--save-every", type=_whole_number(1), metavar="STEPS",
        help="save inside an epoch too, every so many steps (default: after each epoch only)",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true", help="replace the run that the folder holds"
    )
    group.add_argument(
        "-e", "--evaluate", action="store_true",
        help="evaluate --resume FILE on the test set; train nothing",
    )  # fmt: skip
    group.add_argument(
        "--per-class", action="store_true",
        help="with --evaluate: accuracy of each class, and confusion.png beside the checkpoint",
    )  # fmt: skip
    group.add_argument(
        "--estimate", action="store_true",
        help="print parameters, memory and time that the run will need; start nothing",
    )  # fmt: skip
    group.add_argument(
        "--trust-checkpoint", action="store_true",
        help="read a --resume file even if that runs code in it; for files that you know",
    )  # fmt: skip
    group.add_argument(
        "--trace", type=_path, metavar="FILE",
        help="write loss and times of every step as JSON at the end",
    )  # fmt: skip
    group.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard events to the run folder"
    )


def _add_hardware_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpu-id", metavar="IDS",
        help="ids of the GPUs to use, such as 0,1 (default: those of CUDA_VISIBLE_DEVICES)",
    )  # fmt: skip
    group.add_argument(
        "--amp", choices=("off", "bf16"), default="off", help="mixed precision by autocast"
    )
    group.add_argument(
        "--tf32", choices=("on", "off"),
        help="GPU: round fp32 products to TF32 (default: PyTorch's: in convolutions only)",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true",
        help="fuse operations by torch.compile: minutes at the start, needs a C++ compiler",
    )  # fmt: skip
    group.add_argument(
        "--graph", choices=("auto", "on", "off"), default="auto",
        help="GPU: launch the whole step as one CUDA graph; auto does with one worker",
    )  # fmt: skip
    group.add_argument(
        "--resident", choices=("auto", "on", "off"), default="auto",
        help="GPU: keep the images in its memory; auto does where a quarter of it holds them",
    )  # fmt: skip
    group.add_argument(
        "--memory-format", choices=("auto", "contiguous", "channels_last"), default="auto",
        help="of activations; auto tries on the CPU which is faster, once per machine and model",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32",
        help="of parameters and images; float64 is for proofs",
    )  # fmt: skip
    group.add_argument(
        "--deterministic", action="store_true",
        help="use deterministic algorithms only: the same bits every time on one machine",
    )  # fmt: skip
    # torch.distributed.launch passes the local rank; the LOCAL_RANK it also sets is preferred.
    group.add_argument(
        "--local-rank", "--local_rank", type=_whole_number(0), help=argparse.SUPPRESS
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and validate a command line (default: the process's own).

    Raises:
        UserError: a flag, a value or a combination that cannot work; nothing has been done.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    flags = parser._option_string_actions
    for word in words:
        # -epochs would be read as -e pochs
        if word.startswith("-") and f"-{word.partition('=')[0]}" in flags:
            raise UserError(_unknown(word, flags))
        if re.fullmatch("(--[^=]+=|-[a-zA-Z])--", word):  # argparse loses it and sets []
            raise UserError(f"{word}: '--' is no value; give another")
    options, rest = parser.parse_known_args(words)
    if rest:
        raise UserError(_unknown(rest[0], flags))
    for wrong, message in _contradictions(options):
        if wrong:
            raise UserError(message)
    return options


def _unknown(word: str, flags: Iterable[str]) -> str:
    """What is wrong with a word that belongs to no flag."""
    flag = word.partition("=")[0]
    near = difflib.get_close_matches(flag, flags, n=1) if flag[:1] == "-" else []
    fix = f"did you mean {near[0]}?" if near else "python cifar.py -h lists the flags"
    what = f"{flag}: no such flag" if flag[:1] == "-" else f"{word!r}: belongs to no flag"
    return f"{what}; {fix}"


def _contradictions(options: argparse.Namespace) -> list[tuple[bool, str]]:
    o = options
    archive_flags = [
        flag
        for flag, value in (
            ("--data-url", o.data_url),
            ("--data-archive", o.data_archive),
            ("--data-md5", o.data_md5),
        )
        if value
    ]
    return [
        (
            o.per_class and not o.evaluate,
            "--per-class: goes with --evaluate --resume FILE; add them or leave it out",
        ),
        (o.evaluate and not o.resume, "--evaluate: name the checkpoint with --resume FILE"),
        (
            bool(o.overwrite and o.resume),
            f"--overwrite --resume {o.resume}: one replaces the run, the other continues it; "
            "leave one out",
        ),
        (
            bool(o.data_url and o.data_archive),
            f"--data-url --data-archive {o.data_archive}: a file on disk needs no address; "
            "leave one out",
        ),
        (
            bool(archive_flags) and o.dataset not in ("cifar10", "cifar100"),
            f"{' '.join(archive_flags)}: -d {o.dataset} reads no archive; "
            "use -d cifar10 or -d cifar100",
        ),
        (
            o.start_epoch is not None and o.start_epoch >= o.epochs,
            f"--start-epoch {o.start_epoch}: must be below --epochs {o.epochs}",
        ),
        (
            # Beyond that float32 ends, and Python's own numbers with a few hundred epochs more.
            math.log10(o.lr) + len(o.schedule) * max(0.0, math.log10(o.gamma)) > 30,
            f"--lr {o.lr:g} --gamma {o.gamma:g} --schedule {_spaced(o.schedule)}: the learning "
            "rate would grow beyond 1e30; give a smaller --gamma",
        ),
        (
            o.nesterov and o.momentum == 0,
            "--nesterov --momentum 0: Nesterov momentum needs a --momentum above 0",
        ),
        (
            o.amp != "off" and o.dtype == "float64",
            f"--amp {o.amp} --dtype float64: mixed precision starts from float32; leave one out",
        ),
    ]


def warnings(options: argparse.Namespace) -> list[str]:
    """What is odd about a valid command line, a line each."""
    found = []
    if options.schedule != sorted(options.schedule):
        found.append(f"--schedule {_spaced(options.schedule)}: not in ascending order")
    if max(options.schedule) >= options.epochs and not options.evaluate:
        found.append(
            f"--schedule {_spaced(options.schedule)}: reaches past --epochs {options.epochs}; "
            "epochs are counted from 0 and later ones have no effect"
        )
    return found


def of_the_run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the one that says which worker this is."""
    return {name: value for name, value in options.items() if name != "local_rank"}


def _spaced(values: Sequence[int]) -> str:
    return " ".join(str(value) for value in values)


def model_arguments_of(options: argparse.Namespace) -> dict[str, object]:
    """The model flags that the command line sets, by the name of the factory's argument."""
    values = {name: getattr(options, name) for name in MODEL_FLAGS}
    return {name: value for name, value in values.items() if value is not None}
