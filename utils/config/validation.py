"""What is wrong, or odd, about a combination of flags."""

import importlib.util
import math
from collections.abc import Iterator, Sequence

from utils.config.schema import Config, DataConfig, HardwareConfig, RunConfig, TrainConfig
from utils.errors import UserError


def check(config: Config) -> None:
    """Raise UserError where flags contradict each other or ask for what is not installed."""
    for problems in (
        _run_problems(config.run),
        _data_problems(config.data),
        _training_problems(config.train),
        _precision_problems(config.hardware),
    ):
        for message in problems:
            raise UserError(message)


def warnings(train: TrainConfig) -> list[str]:
    """Return what is odd about valid flags of a training, a line each."""
    found = []
    if list(train.schedule) != sorted(train.schedule):
        found.append(f"--schedule {_spaced(train.schedule)}: not in ascending order")
    if max(train.schedule) >= train.epochs:
        found.append(
            f"--schedule {_spaced(train.schedule)}: reaches past --epochs {train.epochs}; "
            "epochs are counted from 0 and later ones have no effect"
        )
    return found


def _run_problems(run: RunConfig) -> Iterator[str]:
    if run.per_class and not run.evaluate:
        yield "--per-class: goes with --evaluate --resume FILE; add them or leave it out"
    if run.evaluate and not run.resume:
        yield "--evaluate: name the checkpoint with --resume FILE"
    if run.overwrite and run.resume:
        yield (
            f"--overwrite --resume {run.resume}: one replaces the run, the other continues it; "
            "leave one out"
        )
    if run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield (
            "--tensorboard: the package tensorboard is missing; install it with "
            "'pip install tensorboard' or leave the flag out"
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    archive_flags = [
        flag
        for flag, value in (
            ("--data-url", data.data_url),
            ("--data-archive", data.data_archive),
            ("--data-md5", data.data_md5),
        )
        if value
    ]
    if data.data_url and data.data_archive:
        yield (
            f"--data-url --data-archive {data.data_archive}: a file on disk needs no address; "
            "leave one out"
        )
    if archive_flags and data.dataset not in ("cifar10", "cifar100"):
        yield (
            f"{' '.join(archive_flags)}: -d {data.dataset} reads no archive; "
            "use -d cifar10 or -d cifar100"
        )


def _training_problems(train: TrainConfig) -> Iterator[str]:
    if train.start_epoch is not None and train.start_epoch >= train.epochs:
        yield f"--start-epoch {train.start_epoch}: must be below --epochs {train.epochs}"
    # Beyond that float32 ends, and Python's own numbers with a few hundred epochs more.
    if math.log10(train.lr) + len(train.schedule) * max(0.0, math.log10(train.gamma)) > 30:
        yield (
            f"--lr {train.lr:g} --gamma {train.gamma:g} --schedule {_spaced(train.schedule)}: the "
            "learning rate would grow beyond 1e30; give a smaller --gamma"
        )
    if train.nesterov and train.momentum == 0:
        yield "--nesterov --momentum 0: Nesterov momentum needs a --momentum above 0"


def _precision_problems(hardware: HardwareConfig) -> Iterator[str]:
    if hardware.amp != "off" and hardware.dtype == "float64":
        yield (
            f"--amp {hardware.amp} --dtype float64: mixed precision starts from float32; "
            "leave one out"
        )


def _spaced(values: Sequence[int]) -> str:
    return " ".join(str(value) for value in values)
