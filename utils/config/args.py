"""The command line: every flag with its default.

Spellings and defaults are those of bearpaw/pytorch-classification, so that its commands run
unchanged; a modern spelling is accepted beside each camel-case one.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence

from utils.config.arg_types import ArgumentParser, matching, one_of, path, real_number, whole_number
from utils.config.schema import Config
from utils.config.validation import check
from utils.errors import UserError
from utils.version import TITLE

DATASETS = ("cifar10", "cifar100", "folder", "synthetic10", "synthetic100")

_MODELS = "{models}"


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to every flag that has one, and the architectures to -a."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if _MODELS in text:
            from models import list_models  # Imports torch, which only a help text is worth.

            text = text.replace(_MODELS, ", ".join(list_models()))
        unset = action.default is None or isinstance(action.default, bool | list)
        if unset or action.default == argparse.SUPPRESS or "default" in text:
            return text
        return text + " (default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every flag, in groups."""
    parser = ArgumentParser(
        description="Train CIFAR-10/100 classifiers with data-parallel all-reduce.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=TITLE,
        help="print the version of this project and exit",
    )  # fmt: skip
    _add_model_flags(parser.add_argument_group("model (unset flags leave the model's own value)"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_gradient_sync_flags(parser.add_argument_group("gradient synchronisation"))
    _add_run_flags(parser.add_argument_group("run folder, resume, evaluate"))
    _add_hardware_flags(parser.add_argument_group("hardware and precision"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-a", "--arch", default="resnet", metavar="NAME",
        help=f"architecture: {_MODELS}",
    )  # fmt: skip
    group.add_argument(
        "--depth", type=whole_number(1, 3000), metavar="N",
        help="layers (default: resnet and preresnet 20, resnext 29, wrn 28, densenet 100)",
    )  # fmt: skip
    group.add_argument(
        "--block-name", metavar="NAME",
        help="resnet, preresnet: BasicBlock or bottleneck (default: BasicBlock)",
    )  # fmt: skip
    group.add_argument(
        "--cardinality", type=whole_number(1, 1000), metavar="N",
        help="resnext: groups (default: 8)",
    )  # fmt: skip
    group.add_argument(
        "--widen-factor", type=whole_number(1, 1000), metavar="N",
        help="resnext, wrn: width multiplier (default: 4)",
    )  # fmt: skip
    group.add_argument(
        "--growthRate", "--growth-rate", dest="growth_rate",
        type=whole_number(1, 1000), metavar="N",
        help="densenet: channels that each layer adds (default: 12)",
    )  # fmt: skip
    group.add_argument(
        "--compressionRate", "--compression-rate", dest="compression_rate",
        type=whole_number(1, 1000), metavar="N",
        help="densenet: transitions divide the channels by this (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--drop", "--dropout", dest="drop", type=real_number(0, below=1), metavar="P",
        help="wrn, densenet: dropout probability (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--checkpoint-activations", action="store_const", const=True,
        help="resnet, densenet: compute activations again in backward: less memory, more time",
    )  # fmt: skip


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-d", "--dataset", type=one_of(DATASETS), default="cifar10", metavar="NAME",
        help=f"one of {', '.join(DATASETS)} (default: cifar10, or the one of --resume FILE)",
    )  # fmt: skip
    group.add_argument(
        "--data", type=path, default="data", metavar="DIR",
        help="where the archives lie or are downloaded to; for -d folder the folder that holds "
        "train/<class>/ and test/<class>/",
    )  # fmt: skip
    group.add_argument(
        "--data-url", action="append", default=[], metavar="URL",
        type=matching("https?://[!-~]+", "an address such as https://host/folder/"),
        help="mirror of the CIFAR archive, tried before the official address; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--data-archive", type=path, metavar="FILE",
        help="CIFAR archive on disk: nothing is downloaded",
    )  # fmt: skip
    group.add_argument(
        "--data-md5", type=matching("[0-9a-fA-F]{32}", "the 32 hex digits of an md5"),
        metavar="HEX", help="md5 of the archive, where a mirror's file differs",
    )  # fmt: skip
    group.add_argument(
        "-j", "--workers", type=whole_number(1, 1000), default=4, metavar="N",
        help="threads that decode a folder of images once; training itself needs none",
    )  # fmt: skip
    group.add_argument(
        "--stats", choices=("true", "legacy"), default="true",
        help="normalise with the data set's true mean and standard deviation, or with the "
        "widespread 0.2023 0.1994 0.2010 (default: true, or what the checkpoint says)",
    )  # fmt: skip
    group.add_argument(
        "--pad-mode", choices=("zero", "reflect"), default="zero",
        help="border that random crops reach into",
    )  # fmt: skip
    group.add_argument(
        "--val-split", type=whole_number(1), metavar="N",
        help="hold out N training images and select the best epoch on them, not on the test set",
    )  # fmt: skip
    group.add_argument(
        "--train-size", type=whole_number(1), metavar="N",
        help="train on N images only (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--test-size", type=whole_number(1), metavar="N",
        help="test on N images only (default: all)",
    )  # fmt: skip


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs", type=whole_number(1), default=300, metavar="N", help="epochs in all"
    )
    group.add_argument(
        "--start-epoch", type=whole_number(0), metavar="N",
        help="first epoch, counted from 0 (default: where the checkpoint stands)",
    )  # fmt: skip
    batch = group.add_mutually_exclusive_group()
    batch.add_argument(
        "--train-batch", type=whole_number(1, 10**6), default=128, metavar="N",
        help="global batch: images per step over all workers",
    )  # fmt: skip
    batch.add_argument(
        "--batch-per-worker", type=whole_number(1, 10**6), metavar="N",
        help="the other spelling: images per step and worker",
    )  # fmt: skip
    group.add_argument(
        "--test-batch", type=whole_number(1, 10**6), default=100, metavar="N",
        help="images per forward pass in evaluation; does not change the result",
    )  # fmt: skip
    group.add_argument(
        "--lr", "--learning-rate", dest="lr", type=real_number(0, exclusive=True), default=0.1,
        metavar="RATE", help="learning rate at the start",
    )  # fmt: skip
    group.add_argument(
        "--lr-scaling", choices=("none", "linear", "sqrt"), default="none",
        help="multiply --lr by (global batch / 128), by its root, or not at all",
    )  # fmt: skip
    group.add_argument(
        "--schedule", type=whole_number(0), nargs="+", default=[150, 225], metavar="EPOCH",
        help="epochs at which the learning rate is multiplied by --gamma (default: 150 225)",
    )  # fmt: skip
    group.add_argument(
        "--gamma", type=real_number(0, exclusive=True), default=0.1, metavar="X",
        help="factor on the learning rate at each --schedule epoch",
    )  # fmt: skip
    group.add_argument(
        "--warmup-steps", type=whole_number(0), default=0, metavar="N",
        help="steps at the start with a smaller learning rate",
    )  # fmt: skip
    group.add_argument(
        "--warmup", choices=("constant", "linear"), default="constant",
        help="warm up at a tenth of the learning rate, or rise from a tenth to all of it",
    )  # fmt: skip
    group.add_argument(
        "--momentum", type=real_number(0, below=1), default=0.9, metavar="X", help="momentum"
    )
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum")
    group.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=real_number(0), default=5e-4,
        metavar="X", help="weight decay",
    )  # fmt: skip
    group.add_argument(
        "--sync-bn", action="store_true",
        help="batch norm over the global batch instead of each worker's shard",
    )  # fmt: skip
    group.add_argument(
        "--on-nan", choices=("stop", "skip", "rewind"), default="stop",
        help="when a loss or gradient is not finite: stop; skip the step; or go back to the "
        "last checkpoint and skip the steps since",
    )  # fmt: skip
    group.add_argument(
        "--manualSeed", "--seed", dest="seed", type=whole_number(0, 2**32 - 1), default=0,
        metavar="N", help="seed of initial weights, order, augmentation and dropout",
    )  # fmt: skip


def _add_gradient_sync_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compression", choices=("none", "fp16"), default="none",
        help="send gradients as they are, or at half precision (the results differ a little)",
    )  # fmt: skip
    group.add_argument(
        "--backward-passes-per-step", type=whole_number(1), default=1, metavar="N",
        help="cut each worker's shard into N passes and average the sum of their gradients: "
        "the same global batch in less memory",
    )  # fmt: skip
    group.add_argument(
        "--adasum", action="store_true",
        help="Horovod with MPI only: combine gradients by Adasum instead of the average",
    )  # fmt: skip
    group.add_argument(
        "--check-replicas", type=whole_number(1), metavar="STEPS",
        help="compare all workers' parameters every so many steps (default: once an epoch)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=real_number(0, exclusive=True), default=600.0, metavar="SECONDS",
        help="end the run when no worker goes on for so long",
    )  # fmt: skip
    # Measurements do the same work without communication.
    group.add_argument("--no-exchange", action="store_true", help=argparse.SUPPRESS)


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-c", "--checkpoint", type=path, metavar="DIR",
        help="run folder (default: checkpoints/<dataset>/<recipe>, or that of --resume FILE)",
    )  # fmt: skip
    group.add_argument(
        "--resume", type=path, metavar="FILE|auto",
        help="continue from a checkpoint; auto: from the newest in the run folder, if any",
    )  # fmt: skip
    group.add_argument(
        "--save-every", type=whole_number(1), metavar="STEPS",
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
        "--trace", type=path, metavar="FILE",
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
    group.add_argument("--local-rank", "--local_rank", type=whole_number(0), help=argparse.SUPPRESS)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Parse and validate a command line (default: the process's own).

    Raises:
        UserError: A flag, a value or a combination cannot work; nothing has been done.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    flags = parser._option_string_actions
    for word in words:
        # argparse would read -epochs as -e pochs.
        if word.startswith("-") and f"-{word.partition('=')[0]}" in flags:
            raise UserError(_unknown(word, flags))
        # argparse loses the value and sets [].
        if re.fullmatch("(--[^=]+=|-[a-zA-Z])--", word):
            raise UserError(f"{word}: '--' is no value; give another")
    options, rest = parser.parse_known_args(words)
    if rest:
        raise UserError(_unknown(rest[0], flags))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    named, _ = parser.parse_known_args(words)
    config = Config.from_options(vars(options)).replace(explicit=frozenset(vars(named)))
    check(config)
    return config


def _unknown(word: str, flags: Iterable[str]) -> str:
    """Return what is wrong with a word that belongs to no flag."""
    flag = word.partition("=")[0]
    near = difflib.get_close_matches(flag, flags, n=1) if flag[:1] == "-" else []
    fix = f"did you mean {near[0]}?" if near else "python cifar.py -h lists the flags"
    what = f"{flag}: no such flag" if flag[:1] == "-" else f"{word!r}: belongs to no flag"
    return f"{what}; {fix}"
