"""Whole runs, trained and evaluated from start to end: cifar.py against the plain script."""

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.common import (
    EpochTimes,
    Ratio,
    Result,
    Settings,
    draw_ratios,
    measure,
    process_environment,
    ratio,
    time_epochs,
    timed,
)
from bench.step import Bare, short_epochs
from tools.commands import engine_command
from utils.config.recipes import Recipe, find_recipe
from utils.distributed.comm import Comm
from utils.files import ROOT

BATCH, TEST_BATCH = 128, 100
EPOCHS = 2
ROUNDS = 2
FLOOR = 1.0  # The seconds that the floor trains for, about.


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        model: The recipe.
        train: The images of the training set.
        test: The images of the test set.
        workers: The processes that train; each has its part of the threads.
    """

    model: str
    train: int
    test: int
    workers: int = 1

    def label(self) -> str:
        """Return the case's name in tables."""
        return f"{self.model}, {self.workers} worker{'s' if self.workers > 1 else ''}"


CASES = (
    Case("alexnet", 10_240, 2_048),
    Case("alexnet", 2_560, 1_024, workers=2),
    Case("resnet20", 2_560, 512),
    Case("vgg19_bn", 256, 100),
)


def run(settings: Settings) -> Result:
    """Measure every case; each variant is a fresh process, or a fresh group of workers."""
    cases: tuple[Case, ...] = CASES
    if settings.models:
        sizes = {case.model: case for case in reversed(CASES)}
        names = [find_recipe(name).name for name in settings.models]
        cases = tuple(sizes.get(name, Case(name, 256, 100)) for name in names)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        cases = tuple(case for case in cases if case.workers <= gpus)
    raw = [measure_case(case, settings) for case in cases]

    rows = [("model", "images", "arm", "start, s", "first epoch, s", "later epochs, s",
             "% of floor", "whole run, s")]  # fmt: skip
    gains = [("plain / ours", "", "", "start", "first epoch", "later epochs", "", "whole run")]
    ratios: dict[str, Ratio] = {}
    for case, numbers in zip(cases, raw, strict=True):
        images = f"{numbers['train']:,} + {numbers['test']:,}"
        for variant in ("ours", "plain"):
            runs = numbers[variant]
            of_floor = "-"
            if numbers["floor"]:
                of_floor = ratio(numbers["floor"], [r["later"] for r in runs]).percent()
            columns = {key: [r[key] for r in runs] for key in ("start", "first", "later", "whole")}
            start, first, later, whole = (f"{median(v):.2f}" for v in columns.values())
            rows.append((case.label(), images, variant, start, first, later, of_floor, whole))
        pairs = {
            key: ratio([r[key] for r in numbers["plain"]], [r[key] for r in numbers["ours"]])
            for key in ("start", "first", "later", "whole")
        }
        start, first, later, whole = map(str, pairs.values())
        gains.append((case.label(), images, "", start, first, later, "", whole))
        ratios[case.label()] = pairs["later"]
    return Result(
        f"epoch: train and evaluate, whole processes, {settings.threads} threads in all, plain "
        f"script with {settings.loaders} loader workers each, {settings.dataset}",
        rows + gains,
        [
            "start: from the start of the process to its first epoch; floor: bare loop on one "
            "constant batch and bare forward passes, for as many images"
        ],
        {"cases": raw, "batch": BATCH, "epochs": EPOCHS},
        lambda axes: draw_ratios(axes, ratios, {}, "plain script's later epochs / ours"),
    )


def measure_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Return the times of every run of both scripts, and the floor's seconds in every round."""
    recipe = find_recipe(case.model)
    train = settings.images(case.train, BATCH)
    test = settings.images(case.test, TEST_BATCH)
    flags = [
        *recipe.flags, "-d", settings.dataset, "--data", settings.data, "--epochs", str(EPOCHS),
        "--train-batch", str(BATCH), "--test-batch", str(TEST_BATCH),
        "--train-size", str(train), "--test-size", str(test), "--lr", "0.01",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ours = [str(ROOT / "cifar.py"), *flags, "-c", str(Path(folder, "ours")), "--overwrite"]
        plain = ["-m", "bench.plain", *flags, "-c", str(Path(folder, "plain"))]
        plain += ["-j", str(settings.loaders)]
        variants: dict[str, Any] = {
            "ours": partial(_process, case, "ours", ours, settings),
            "plain": partial(_process, case, "plain", plain, settings),
        }
        if case.workers == 1:
            variants["floor"] = partial(_floor, recipe, train, test, settings)
        results = measure(variants, settings.rounds or ROUNDS)
    return {
        **asdict(case), "train": train, "test": test,
        "ours": results["ours"], "plain": results["plain"], "floor": results.get("floor", []),
    }  # fmt: skip


def _process(case: Case, variant: str, script: list[str], settings: Settings) -> dict[str, Any]:
    print(f"-- epoch: {case.label()}, {variant}", flush=True)
    engine = "serial" if case.workers == 1 else "dist"
    command = engine_command(engine, case.workers, *script)
    environment = process_environment(max(1, settings.threads // case.workers))
    return summary(time_epochs(command, environment))


def summary(times: EpochTimes) -> dict[str, Any]:
    """Return the times with first and later epochs apart."""
    first, *later = times.epochs
    return {
        "start": times.start, "first": first, "later": median(later or [first]),
        "whole": times.whole, "epochs": times.epochs,
    }  # fmt: skip


def _floor(recipe: Recipe, train: int, test: int, settings: Settings) -> float:
    """Return the seconds of an epoch of the given sizes by bare loops."""
    comm = Comm()
    device = comm.device
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        bare = Bare(short_epochs(recipe, BATCH, comm))
        bare.train(1)
        once = timed(partial(bare.train, 1), device)
        steps = max(1, round(FLOOR * settings.scale / once))
        training = timed(partial(bare.train, steps), device) / (steps * BATCH)
        bare.images = bare.images[:TEST_BATCH]
        bare.evaluate(1)
        evaluation = timed(partial(bare.evaluate, steps), device) / (steps * TEST_BATCH)
    finally:
        torch.set_num_threads(before)
    return train * training + test * evaluation
