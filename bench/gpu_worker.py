"""What the worker process of bench/gpu.py measures: a JSON line for every variant.

Everything measured is the program's own training, but the images are made once for all variants. A
variant is a few words:

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
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from bench import plain
from bench.common import measure, process_environment, time_epochs, timed
from bench.training import RATE, Training, constant_rate
from tools.commands import engine_command
from utils.config.recipes import Recipe, find_recipe
from utils.data.datasets import Dataset, load_dataset
from utils.distributed.comm import Comm
from utils.errors import FAILED
from utils.files import ROOT
from utils.launch.processes import end_with_parent
from utils.runtime.exit_codes import exit_process
from utils.training import build

TRAIN, TEST = 50_000, 10_000
FIRST = 5  # The steps in which a graph is warmed up, recorded and replayed once.
PROBE = 5  # The steps that tell how long an epoch will be.
LONG = 5.0  # The seconds of an epoch above which only a part of it is trained.
PROFILED = 20  # The steps of a profile.
PLAIN_ROUNDS = 2
SCRIPT_EPOCHS = 4


def assemble(recipe: Recipe, data: Dataset, words: Sequence[str], comm: Comm) -> Training:
    """Return the training of a recipe as the words of a variant want it."""
    flags = ["--amp", "bf16" if "bf16" in words else "off"]
    flags += ["--graph", "auto" if "graph" in words else "off"]
    if "compiled" in words:
        flags.append("--compile")
    return Training(constant_rate(recipe, *flags), data, comm)


def warm_up(training: Training) -> float:
    """Return the seconds of the first steps.

    In them algorithms are chosen, the graph is recorded and code is compiled. The smaller last
    batch of an epoch is one of them, since it wants algorithms of its own.
    """
    slices = training.plan.batch_slices
    first = partial(training.train_on, [*slices[:FIRST], slices[-1]])
    return timed(first, training.comm.device)


def affordable(training: Training, seconds: float, most: int) -> tuple[int, float]:
    """Return how many steps, ``most`` or fewer, take these seconds, and what one step takes."""
    in_epoch = len(training.plan.batch_slices)
    probe = min(PROBE, in_epoch)
    once = timed(partial(training.train, probe), training.comm.device) / probe
    return max(probe, min(most, in_epoch, int(seconds / once))), once


def measure_training(
    recipe: Recipe, data: Dataset, words: Sequence[str], comm: Comm
) -> dict[str, Any]:
    """Return the seconds of first steps, capture, training and evaluation, and the peak memory."""
    device = comm.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.closing(assemble(recipe, data, words, comm)) as training:
        slices, graph = training.plan.batch_slices, training.loop.graph
        start = warm_up(training)
        first_evaluation = timed(training.evaluate, device)
        steps, once = affordable(training, LONG, most=len(slices))
        turns = range(3 if once * steps < 1 else 1)
        seconds = [timed(partial(training.train, steps), device) for _ in turns]
        evaluation = [timed(training.evaluate, device) for _ in turns]
    a_step = median(seconds) / steps
    images = sum(stop - start for start, stop in slices[:steps])
    return {
        "start": start,
        "capture": graph.recorder.seconds if graph else None,
        "first": start + first_evaluation + a_step * max(0, len(slices) - FIRST - 1),
        "epoch": a_step * len(slices) + median(evaluation),
        "training": seconds,
        "evaluation": evaluation,
        "steps": steps,
        "of_steps": len(slices),
        "images_per_second": images / median(seconds),
        "peak_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "memory_format": training.memory_format,
        "warnings": [graph.failure] if graph and graph.failure else [],
    }


def measure_plain(
    recipe: Recipe, data: Dataset, comm: Comm, loaders: Sequence[int]
) -> dict[str, Any]:
    """Return the seconds of an epoch of the plain script, by its loader workers, and of ours.

    Both train in fp32.
    """
    with contextlib.closing(assemble(recipe, data, ["fp32", "graph"], comm)) as ours:
        warm_up(ours)
        ours.evaluate()

        def our_epoch() -> float:
            training = timed(partial(ours.train, len(ours.plan.batch_slices)), comm.device)
            return training + timed(ours.evaluate, comm.device)

        config = plain.parse([*recipe.flags, "--lr", str(RATE)])
        train = config.train
        model = build.network(config.model, len(data.classes)).to(comm.device)
        optimizer = plain.sgd(model, train)

        def plain_epoch(train_loader: Any, test_loader: Any) -> None:
            model.train()
            plain.one_pass("train", train_loader, model, comm.device, optimizer, False)
            model.eval()
            with torch.no_grad():
                plain.one_pass("valid", test_loader, model, comm.device, None, False)

        test = ours.splits.test
        index = torch.arange(train.train_batch, device=test.storage_device) % len(test)
        constant = [test.batch(index)] * 3
        plain_epoch(constant, constant)  # Pays for memory and the choice of algorithms.
        variants: dict[str, Callable[[], float]] = {"ours": our_epoch}
        for count in loaders:
            action = partial(plain_epoch, *plain.loaders(data, train, count, None))
            variants[f"plain, {count} loaders"] = partial(timed, action, comm.device)
        seconds = measure(variants, PLAIN_ROUNDS)
    return {"images": len(data.train_labels), "seconds": seconds}


def part_of(data: Dataset, fraction: float) -> Dataset:
    """Return the first images of both sets."""
    train, test = (
        max(1, round(fraction * len(labels))) for labels in (data.train_labels, data.test_labels)
    )
    return replace(
        data,
        train_images=data.train_images[:train],
        train_labels=data.train_labels[:train],
        test_images=data.test_images[:test],
        test_labels=data.test_labels[:test],
    )


def measure_script(recipe: Recipe, data: Dataset, words: Sequence[str]) -> dict[str, Any]:
    """Return the seconds of the epochs of cifar.py, read off its lines."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *recipe.flags, "-d", data.name, "--train-size", str(len(data.train_labels)),
            "--test-size", str(len(data.test_labels)), "--epochs", str(SCRIPT_EPOCHS),
            "--lr", str(RATE), "-c", folder, "--amp", "bf16" if "bf16" in words else "off",
        ]  # fmt: skip
        command = engine_command("serial", 1, str(ROOT / "cifar.py"), *flags)
        times = time_epochs(command, process_environment(torch.get_num_threads()))
    first, *later = times.epochs
    return {
        "start": times.start, "first": first, "epoch": median(later), "epochs": times.epochs,
        "whole": times.whole,
    }  # fmt: skip


def measure_kernels(
    recipe: Recipe, data: Dataset, words: Sequence[str], comm: Comm
) -> dict[str, Any]:
    """Return what the device does in some steps: its kernels, and how long it is idle.

    A kernel is [name, count, microseconds]. On the CPU, where there are none, the operations stand
    for them.
    """
    kind = torch.autograd.DeviceType.CPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    if comm.device.type == "cuda":
        kind = torch.autograd.DeviceType.CUDA
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with contextlib.closing(assemble(recipe, data, words, comm)) as training:
        warm_up(training)
        steps, _ = affordable(training, 2.0, most=PROFILED)
        with torch.profiler.profile(activities=activities) as profiler:
            seconds = timed(partial(training.train, steps), comm.device)
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
    """Return the part of the time, from the first begin to the last end, that none covers."""
    ordered = sorted(intervals)
    if not ordered:
        return 1.0
    first = covered_to = ordered[0][0]
    gaps = 0.0
    for begin, end in ordered:
        gaps += max(0.0, begin - covered_to)
        covered_to = max(covered_to, end)
    return gaps / (covered_to - first) if covered_to > first else 0.0


def measure_variant(
    recipe: Recipe,
    data: Dataset,
    words: Sequence[str],
    comm: Comm,
    loaders: Sequence[int],
    fraction: float,
) -> dict[str, Any]:
    """Return what has been measured of a variant.

    Args:
        recipe: The recipe.
        data: All images.
        words: The words of the variant.
        comm: The serial engine.
        loaders: The numbers of DataLoader workers to try in the plain script.
        fraction: The part of the images to compare with the plain script on.
    """
    match words[0]:
        case "plain":
            return measure_plain(recipe, part_of(data, fraction), comm, loaders)
        case "script":
            return measure_script(recipe, data, words)
        case "profile":
            return measure_kernels(recipe, data, words, comm)
    return measure_training(recipe, data, words, comm)


def main() -> int:
    """Measure the variants that stand on the command line as MODEL:VARIANT:FRACTION."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--loaders", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    end_with_parent()
    lines = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # Whatever else is printed goes there.
        comm = Comm()
        sizes = [max(1, round(options.scale * count)) for count in (TRAIN, TEST)]
        data = load_dataset("synthetic10", "data", train_size=sizes[0], test_size=sizes[1])
        print(json.dumps({"ready": True}), file=lines, flush=True)
        for text in options.variants:
            name, variant, fraction = text.split(":")
            recipe = find_recipe(name)
            try:
                found = measure_variant(
                    recipe, data, variant.split(), comm, options.loaders, float(fraction)
                )
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(json.dumps({"model": name, "arm": variant, **found}), file=lines, flush=True)
            if "error" in found or found.get("warnings"):
                return FAILED  # What a GPU does after such a thing is uncertain.
            gc.collect()  # Of what a graph holds.
            if comm.device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    exit_process(main())
