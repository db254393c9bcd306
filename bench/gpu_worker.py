"""What the worker process of bench/gpu.py measures: a JSON line for every arm.

The arms are the program's own: its sets, step, graph, epoch and evaluation are built here as
utils.engine.run builds them, but the images are made once for all arms. An arm is a few words:

fp32 | bf16, then graph and compiled     steady epochs of the training loop
plain                                    the loop of bench/plain.py, in turns with "fp32 graph"
script, then fp32 | bf16                 cifar.py itself in a fresh process
profile, then as in the first line       kernels of some steps, and how long the device is idle
"""

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from bench import plain
from bench.common import arm_environment, measure, time_epochs, timed
from tools.commands import engine_command
from utils.checkpoint.train_state import Position
from utils.config.args import parse_args
from utils.config.recipes import Recipe, find_recipe
from utils.data import sampling as order
from utils.data.datasets import Dataset, load_dataset
from utils.distributed.comm import Comm, Exchange
from utils.engine import leave
from utils.errors import FAILED
from utils.files import ROOT
from utils.launch.supervisor import end_with_parent
from utils.metrics.meter import Meter
from utils.metrics.step_times import StepTimes
from utils.runtime.memory_format import lay_out
from utils.startup import (
    build_model,
    build_sets,
    compile_blocks,
    global_batch,
    make_reproducible,
    memory_format_for,
)
from utils.training.cuda_graph import RECORDERS, Recorder, StepGraph
from utils.training.evaluation import evaluate
from utils.training.optim import build_optimizer
from utils.training.step import Step
from utils.training.trainer import train_one_epoch

TRAIN, TEST = 50_000, 10_000
RATE = 1e-3  # small: a network that diverges computes with other numbers, at another speed
FIRST = 5  # steps, in which a graph is warmed up, recorded and replayed once
PROBE = 5  # steps that tell how long an epoch will be
LONG = 5.0  # seconds; a longer epoch is trained in part
PROFILED = 20  # steps
PLAIN_ROUNDS = 2
SCRIPT_EPOCHS = 4


class Trainer:
    """The training loop on one recipe.

    Args:
        recipe: whose flags are in force.
        data: the images.
        words: of the arm.
        comm: the serial engine.

    Attributes:
        bounds: the batches of an epoch.
        warnings: what the graph has said.
    """

    def __init__(self, recipe: Recipe, data: Dataset, words: Sequence[str], comm: Comm) -> None:
        amp = "bf16" if "bf16" in words else "off"
        options = parse_args([*recipe.flags, "--epochs", "1", "--amp", amp])
        make_reproducible(options.seed, deterministic=False)
        self.comm = comm
        self.options = options
        self.train_set, _, self.test_set = build_sets(data, options, comm)
        model = build_model(options, len(data.classes)).to(comm.device)
        self.memory_format = memory_format_for(model, options, None, len(self.train_set), comm)
        lay_out(model, (self.train_set, self.test_set), self.memory_format, comm)
        if "compiled" in words:
            compile_blocks(model)
        self.recorder: Recorder | None = None
        rate: float | Tensor = RATE
        if "graph" in words and comm.device.type in RECORDERS:
            self.recorder = RECORDERS[comm.device.type](comm.device)
            rate = torch.tensor(RATE, device=comm.device)
        optimizer = build_optimizer(
            model, rate, options.momentum, options.weight_decay, options.nesterov
        )
        self.step = Step(comm, *comm.wrap(model, optimizer, Exchange()), options.amp)
        self.meter = Meter(comm.device)
        batch = global_batch(options, comm.size, len(self.train_set))
        self.bounds = order.batches(len(self.train_set), batch, comm.size)
        self.warnings: list[str] = []
        self.graph = None
        if self.recorder:
            self.graph = StepGraph(
                self.step, self.train_set, self.meter, batch, batch, comm.graph_warm_up,
                self.recorder, self.warnings.append,
            )  # fmt: skip

    def train(self, bounds: Sequence[tuple[int, int]]) -> float:
        """Seconds of an epoch of these batches."""

        def epoch() -> None:
            train_one_epoch(
                self.step,
                self.graph,
                self.meter,
                self.train_set,
                list(bounds),
                [RATE] * len(bounds),
                Position(),
                self.options.seed,
                self.comm,
                StepTimes(),
                lambda _: None,
            )

        with self.recorder.on_stream() if self.recorder else contextlib.nullcontext():
            return timed(epoch, self.comm.device)

    def evaluate(self) -> float:
        """Seconds of an evaluation of the whole test set."""
        arguments = (self.test_set, self.options.test_batch, self.options.amp, self.comm)
        return timed(partial(evaluate, self.step.model, *arguments), self.comm.device)

    def warm_up(self) -> float:
        """Seconds of the first steps: algorithms are chosen, the graph is recorded, code compiled.

        The smaller last batch of an epoch is one of them, since it wants algorithms of its own.
        """
        return self.train([*self.bounds[:FIRST], self.bounds[-1]])

    def affordable(self, seconds: float, most: int) -> tuple[int, float]:
        """Steps, at most so many, that take these seconds, and what one takes."""
        some = self.bounds[:PROBE]
        once = self.train(some) / len(some)
        return max(len(some), min(most, len(self.bounds), int(seconds / once))), once


def images(bounds: Iterable[tuple[int, int]]) -> int:
    """How many are in these batches."""
    return sum(stop - start for start, stop in bounds)


def measure_training(
    recipe: Recipe, data: Dataset, words: Sequence[str], comm: Comm
) -> dict[str, Any]:
    """Seconds of first steps, capture, training and evaluation, and the peak of the memory."""
    if comm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(comm.device)
    trainer = Trainer(recipe, data, words, comm)
    start = trainer.warm_up()
    first_evaluation = trainer.evaluate()
    steps, once = trainer.affordable(LONG, most=len(trainer.bounds))
    turns = 3 if once * steps < 1 else 1
    part = trainer.bounds[:steps]
    training = [trainer.train(part) for _ in range(turns)]
    evaluation = [trainer.evaluate() for _ in range(turns)]
    a_step = median(training) / steps
    peak = torch.cuda.max_memory_allocated(comm.device) if comm.device.type == "cuda" else 0
    return {
        "start": start,
        "capture": trainer.recorder.seconds if trainer.recorder else None,
        "first": start + first_evaluation + a_step * max(0, len(trainer.bounds) - FIRST - 1),
        "epoch": a_step * len(trainer.bounds) + median(evaluation),
        "training": training,
        "evaluation": evaluation,
        "steps": steps,
        "of_steps": len(trainer.bounds),
        "images_per_second": images(part) / median(training),
        "peak_memory": peak,
        "memory_format": trainer.memory_format,
        "warnings": trainer.warnings,
    }


def measure_plain(
    recipe: Recipe, data: Dataset, comm: Comm, loaders: Sequence[int]
) -> dict[str, Any]:
    """Seconds of an epoch of the plain script, by its loader workers, and of ours, in fp32."""
    ours = Trainer(recipe, data, ["fp32", "graph"], comm)
    ours.warm_up()
    ours.evaluate()
    arms: dict[str, Callable[[], float]] = {
        "ours": lambda: ours.train(ours.bounds) + ours.evaluate()
    }
    options = plain.parse([*recipe.flags, "--lr", str(RATE)])
    model = build_model(options, len(data.classes)).to(comm.device)
    optimizer = SGD(
        model.parameters(), lr=RATE, momentum=options.momentum, weight_decay=options.weight_decay
    )
    constant = ours.test_set.batch(
        torch.arange(options.train_batch, device=ours.test_set.home) % len(ours.test_set)
    )

    def epoch(train_loader: Any, test_loader: Any) -> None:
        model.train()
        plain.one_pass("train", train_loader, model, comm.device, optimizer, False)
        model.eval()
        with torch.no_grad():
            plain.one_pass("valid", test_loader, model, comm.device, None, False)

    epoch([constant] * 3, [constant] * 3)  # pays for memory and the choice of algorithms
    for count in loaders:
        options.workers = count
        action = partial(epoch, *plain.loaders(data, options, None))
        arms[f"plain, {count} loaders"] = partial(timed, action, comm.device)
    return {"images": len(data.train_labels), "seconds": measure(arms, PLAIN_ROUNDS)}


def part_of(data: Dataset, share: float) -> Dataset:
    """The first images of both sets."""
    train, test = (max(1, round(share * len(x))) for x in (data.train_labels, data.test_labels))
    return Dataset(
        data.name, data.classes, data.train_images[:train], data.train_labels[:train],
        data.test_images[:test], data.test_labels[:test], data.mean, data.std,
    )  # fmt: skip


def measure_script(recipe: Recipe, data: Dataset, words: Sequence[str]) -> dict[str, Any]:
    """Seconds of the epochs of cifar.py, read off its lines."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *recipe.flags, "-d", data.name, "--train-size", str(len(data.train_labels)),
            "--test-size", str(len(data.test_labels)), "--epochs", str(SCRIPT_EPOCHS),
            "--lr", str(RATE), "-c", folder, "--amp", "bf16" if "bf16" in words else "off",
        ]  # fmt: skip
        command = engine_command("serial", 1, str(ROOT / "cifar.py"), *flags)
        times = time_epochs(command, arm_environment(torch.get_num_threads()))
    first, *later = times.epochs
    return {
        "start": times.start, "first": first, "epoch": median(later), "epochs": times.epochs,
        "whole": times.whole,
    }  # fmt: skip


def measure_kernels(
    recipe: Recipe, data: Dataset, words: Sequence[str], comm: Comm
) -> dict[str, Any]:
    """What the device does in some steps: [name, count, microseconds] by kernel, and idle share.

    On the CPU, where there are no kernels, the operations stand for them.
    """
    kind = torch.autograd.DeviceType.CPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    if comm.device.type == "cuda":
        kind = torch.autograd.DeviceType.CUDA
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    trainer = Trainer(recipe, data, words, comm)
    trainer.warm_up()
    steps, _ = trainer.affordable(2.0, most=PROFILED)
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = trainer.train(trainer.bounds[:steps])
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    kernels: dict[str, list[Any]] = {}
    for name, begin, end in events:
        entry = kernels.setdefault(name, [name, 0, 0.0])
        entry[1] += 1
        entry[2] += end - begin
    return {
        "steps": steps,
        "seconds": seconds,
        "idle": idle([(begin, end) for _, begin, end in events]),
        "kernels": sorted(kernels.values(), key=lambda entry: -entry[2]),
    }


def idle(intervals: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first begin to the last end that no interval covers."""
    ordered = sorted(intervals)
    if not ordered:
        return 1.0
    first = covered_to = ordered[0][0]
    gaps = 0.0
    for begin, end in ordered:
        gaps += max(0.0, begin - covered_to)
        covered_to = max(covered_to, end)
    return gaps / (covered_to - first) if covered_to > first else 0.0


def measure_arm(
    recipe: Recipe, data: Dataset, arm: str, comm: Comm, loaders: Sequence[int], share: float
) -> dict[str, Any]:
    """What an arm has found."""
    words = arm.split()
    if words[0] == "plain":
        return measure_plain(recipe, part_of(data, share), comm, loaders)
    if words[0] == "script":
        return measure_script(recipe, data, words)
    if words[0] == "profile":
        return measure_kernels(recipe, data, words, comm)
    return measure_training(recipe, data, words, comm)


def main() -> int:
    """Measure the arms that stand on the command line as MODEL:ARM[:SHARE]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--loaders", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    end_with_parent()
    lines = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # whatever else is printed
        comm = Comm()
        sizes = [max(1, round(options.scale * count)) for count in (TRAIN, TEST)]
        data = load_dataset("synthetic10", "data", train_size=sizes[0], test_size=sizes[1])
        print(json.dumps({"ready": True}), file=lines, flush=True)
        for text in options.arms:
            name, arm, share = text.split(":")
            recipe = find_recipe(name)
            try:
                found = measure_arm(recipe, data, arm, comm, options.loaders, float(share))
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(json.dumps({"model": name, "arm": arm, **found}), file=lines, flush=True)
            if "error" in found or found.get("warnings"):
                return FAILED  # what a GPU does after such a thing is uncertain
            gc.collect()  # of what a graph holds
            if comm.device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    leave(main())
