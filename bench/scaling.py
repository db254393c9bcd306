"""Several workers: throughput, and where the time of a step goes."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.common import Ratio, Result, Settings, arm_environment, draw_ratios, measure, ratio
from tools.arms import ROOT, SCRIPTS, engine_command, has_horovod
from utils.recipes import Recipe, find_recipe

BATCH = 128  # global
IMAGES = {"alexnet": 2_560, "resnet20": 1_280}
FEW = 512  # of any other model
ROUNDS = 2
MOST = 4  # workers
WITHOUT = {"alexnet": 0.88, "resnet20": 0.95}  # DDP over the same workers without all-reduce
HOROVOD = {"alexnet": 0.90}  # Horovod over DDP


class Arm(NamedTuple):
    """A group of workers; with exchange off they train without all-reduce."""

    engine: str
    workers: int
    threads: int = 1
    exchange: bool = True

    def label(self) -> str:
        """For tables."""
        parts = ["one process" if self.engine == "serial" else f"{self.engine}, {self.workers}"]
        if self.threads > 1:
            parts.append(f"{self.threads} threads")
        if not self.exchange:
            parts.append("no all-reduce")
        return ", ".join(parts)


def choose_arms(most: int, horovod: bool, gpus: int) -> list[Arm]:
    """One process; every number of workers; on CPUs one process that has all their threads."""
    arms = [Arm("serial", 1)]
    if most > 1 and not gpus:
        arms.append(Arm("serial", 1, threads=most))
    for workers in (n for n in (2, 3, 4) if n <= most):
        arms += [Arm("dist", workers), Arm("dist", workers, exchange=False)]
        if horovod:
            arms.append(Arm("horovod", workers))
    return arms


def run(settings: Settings) -> Result:
    """Measure every model with every group of workers."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = gpus if gpus > 1 else 0  # one GPU scales to nothing: measure the processor
    most = min(gpus or len(os.sched_getaffinity(0)), MOST)
    arms = choose_arms(most, has_horovod(), gpus)
    raw: dict[str, Any] = {}
    for name in settings.models or IMAGES:
        recipe = find_recipe(name)
        raw[recipe.name] = measure_model(recipe, arms, gpus > 0, settings)

    rows = [("model", "arm", "images/s", "data", "compute", "communication", "of no all-reduce",
             "target", "of dist", "target")]  # fmt: skip
    notes = [
        f"global batch {BATCH}, one thread a worker unless said otherwise; communication: what "
        "the same workers save without all-reduce; of no all-reduce: the speed that is left"
    ]
    ratios: dict[str, Ratio] = {}
    targets = {}
    for name, traces in raw.items():
        for arm in arms:
            kept = kept_speed(arm, traces)
            against = speed_ratio(arm, arm._replace(engine="dist"), traces)
            wanted = WITHOUT.get(name) if arm.engine == "dist" and arm.exchange else None
            of_dist = HOROVOD.get(name) if arm.engine == "horovod" else None
            if kept:
                ratios[f"{name}, {arm.label()}"] = kept
                if wanted:
                    targets[f"{name}, {arm.label()}"] = wanted
            rows.append(
                (
                    name,
                    arm.label(),
                    f"{median(speeds(traces[arm.label()])):,.0f}",
                    *split(arm, traces),
                    kept.percent() if kept else "-",
                    f">= {wanted:.0%}" if wanted else "-",
                    against.percent() if against and arm.engine == "horovod" else "-",
                    f">= {of_dist:.0%}" if of_dist else "-",
                )
            )
        notes += verdict(name, arms, traces)
    return Result(
        f"scaling: up to {most} workers on {'GPUs' if gpus else 'cores'}",
        rows,
        notes,
        raw,
        lambda axes: draw_ratios(axes, ratios, targets, "speed / that without all-reduce"),
    )


def measure_model(
    recipe: Recipe, arms: list[Arm], on_gpus: bool, settings: Settings
) -> dict[str, list[Any]]:
    """The trace of every run, by the arm's label."""
    images = settings.images(IMAGES.get(recipe.name, FEW), 4 * BATCH)
    with tempfile.TemporaryDirectory() as folder:
        actions = {
            arm.label(): partial(_trace, arm, recipe, images, on_gpus, Path(folder), settings)
            for arm in arms
        }
        return measure(actions, settings.rounds or ROUNDS)


def _trace(
    arm: Arm, recipe: Recipe, images: int, on_gpus: bool, folder: Path, settings: Settings
) -> dict[str, Any]:
    print(f"-- scaling: {recipe.name}, {arm.label()}", flush=True)
    trace = folder / "trace.json"
    flags = [
        *recipe.flags, "-d", settings.dataset, "--data", settings.data, "--epochs", "1",
        "--train-batch", str(BATCH), "--train-size", str(images), "--test-size", "100",
        "--lr", "0.01", "-c", str(folder / "run"), "--overwrite", "--trace", str(trace),
    ]  # fmt: skip
    if not arm.exchange:
        flags.append("--no-exchange")
    command = engine_command(arm.engine, arm.workers, str(ROOT / SCRIPTS[arm.engine]), *flags)
    hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        command, env=arm_environment(arm.threads, **hidden), check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(trace.read_text())


def step_seconds(trace: Mapping[str, Any]) -> tuple[float, float]:
    """Median seconds of a step for data and for the rest, the first step left out.

    The first one pays for memory and connections.
    """
    return median(trace["data_seconds"][1:]), median(trace["compute_seconds"][1:])


def speeds(traces: list[Any]) -> list[float]:
    """Images per second of each run, over all its workers."""
    return [trace["global_batch"][0] / sum(step_seconds(trace)) for trace in traces]


def speed_ratio(arm: Arm, other: Arm, traces: Mapping[str, list[Any]]) -> Ratio | None:
    """The arm's speed over the other's; None where the other has not run, or is the same."""
    if arm == other or other.label() not in traces:
        return None
    return ratio(speeds(traces[arm.label()]), speeds(traces[other.label()]))


def kept_speed(arm: Arm, traces: Mapping[str, list[Any]]) -> Ratio | None:
    """The arm's speed over that of the same workers without all-reduce."""
    return speed_ratio(arm, arm._replace(engine="dist", exchange=False), traces)


def split(arm: Arm, traces: Mapping[str, list[Any]]) -> tuple[str, str, str]:
    """Shares of a step: data, compute, exposed communication."""
    own = traces[arm.label()]
    apart = traces.get(arm._replace(engine="dist", exchange=False).label(), own)
    shares = []
    for trace, other in zip(own, apart, strict=True):
        data, compute = step_seconds(trace)
        alone = min(compute, step_seconds(other)[1])
        shares.append([part / (data + compute) for part in (data, alone, compute - alone)])
    middle = [f"{median(parts):.0%}" for parts in zip(*shares, strict=True)]
    return middle[0], middle[1], middle[2]


def verdict(name: str, arms: list[Arm], traces: Mapping[str, list[Any]]) -> list[str]:
    """Whether the largest group of DDP workers beats one process that has as many threads."""
    most = max(arm.workers for arm in arms)
    if most == 1:
        return ["one core: nothing to scale"]
    together = Arm("dist", most)
    alone = max((arm for arm in arms if arm.workers == 1), key=lambda arm: arm.threads)
    gain = speed_ratio(together, alone, traces)
    assert gain is not None
    pays = "more workers pay" if gain.median > 1 else "more workers do not pay"
    return [f"{name}: {most} workers are {gain} times as fast as {alone.label()}: {pays} here"]
