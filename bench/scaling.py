"""Several workers: throughput, and where the time of a step goes.

The workers of a group are processes that are started as the launcher starts them. Inside a group
the ways of training take turns of a fraction of a second, so that a noisy neighbour slows all of
them down: with all-reduce; without, but waiting for each other after each step; and each worker for
itself. The module is also its own worker.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch

from bench.common import (
    Ratio,
    Result,
    Settings,
    draw_ratios,
    measure,
    process_environment,
    ratio,
    timed,
)
from bench.step import DIFFERENT, short_epochs
from bench.training import Training
from tools.commands import engine_class, engine_command
from utils import log
from utils.config.recipes import Recipe, find_recipe
from utils.distributed.comm import Comm
from utils.files import write_text
from utils.launch.commands import has_horovod
from utils.launch.environment import core_count
from utils.runtime.exit_codes import exit_process

BATCH = 128  # The global batch.
MODELS = ("alexnet", "resnet20")
ROUNDS = 2  # The turns of each group.
TURNS = 10  # The turns of each way of training in a group.
TURN = 0.4  # The seconds of a turn; a step at least.
# The seconds for all turns of a model in a group; slow steps get fewer turns, but two.
LONGEST = 15.0
EPOCHS = 50_000 // (DIFFERENT * BATCH)  # A run this long is worth a trial of the memory format.
MOST = 4  # The workers of the largest group.
# The targets: the speed of DDP over that of the same workers apart, and that of Horovod over DDP's.
OF_APART = {"alexnet": 0.88, "resnet20": 0.95}
HOROVOD_OF_DDP = {"alexnet": 0.90}


class Way(NamedTuple):
    """How the workers of a group train.

    Attributes:
        flags: The flags of it.
        lockstep: Whether the workers wait for each other after each step.
    """

    flags: tuple[str, ...] = ()
    lockstep: bool = False


WAYS = {
    "all-reduce": Way(),
    "waiting": Way(("--no-exchange",), lockstep=True),
    "apart": Way(("--no-exchange",)),
}


class Group(NamedTuple):
    """Workers with an engine, and the threads of each."""

    engine: str
    workers: int
    threads: int = 1

    def label(self) -> str:
        """Return the group's name in tables."""
        parts = ["one process" if self.engine == "serial" else f"{self.engine}, {self.workers}"]
        if self.threads > 1:
            parts.append(f"{self.threads} threads")
        return ", ".join(parts)


class Turns(NamedTuple):
    """What a group has measured of a model.

    Attributes:
        images: The images of a turn, over all workers.
        data: The median of the seconds that a step of the first worker waits for its batch.
        steps: The steps of a turn.
        seconds: The seconds of the turns of each way of training.
    """

    images: int
    data: float
    steps: int
    seconds: dict[str, list[float]]

    def speed(self) -> float:
        """Return the images per second with all-reduce."""
        return self.images / median(self.seconds["all-reduce"])

    def kept(self) -> Ratio | None:
        """Return the speed with all-reduce over that of workers that train apart."""
        if "apart" not in self.seconds:
            return None
        return ratio(self.seconds["apart"], self.seconds["all-reduce"])

    def parts(self) -> list[float]:
        """Return the parts of a step with all-reduce, which add up to 1.

        They are data, compute, waiting for the others, and sending.
        """
        whole, waiting, apart = (
            median(self.seconds.get(way, self.seconds["all-reduce"])) for way in WAYS
        )
        apart, waiting = min(apart, whole), min(max(waiting, apart), whole)
        data = self.data * self.steps
        return [part / whole for part in (data, apart - data, waiting - apart, whole - waiting)]


# What the groups have measured: by model, by group, round by round.
Found: TypeAlias = Mapping[str, Mapping[Group, Sequence[Turns]]]


def choose_groups(most: int, horovod: bool, gpus: int) -> list[Group]:
    """Return one process, on CPUs one that has all their threads, and every number of workers."""
    groups = [Group("serial", 1)]
    if most > 1 and not gpus:
        groups.append(Group("serial", 1, threads=most))
    for workers in (n for n in (2, 3, 4) if n <= most):
        groups.append(Group("dist", workers))
        if horovod:
            groups.append(Group("horovod", workers))
    return groups


def run(settings: Settings) -> Result:
    """Measure every model with every group of workers."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = gpus if gpus > 1 else 0  # One GPU scales to nothing: the processor is measured.
    most = min(gpus or core_count(), MOST)
    models = [find_recipe(name).name for name in settings.models or MODELS]
    groups = choose_groups(most, has_horovod(), gpus)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "turns.json")
        actions = {
            group.label(): partial(_group, group, models, gpus > 0, path, settings)
            for group in groups
        }
        raw = measure(actions, settings.rounds or ROUNDS)
    found = {
        name: {group: [Turns(*one[name]) for one in raw[group.label()]] for group in groups}
        for name in models
    }
    rows, ratios, targets = table(found)
    return Result(
        f"scaling: up to {most} workers on {'GPUs' if gpus else 'cores'}",
        rows,
        [
            f"global batch {BATCH}, one thread a worker unless said otherwise; waiting: for the "
            "slowest worker, without sending anything; apart: the same workers each for itself",
            *(line for name in models for line in verdict(name, found[name])),
        ],
        raw,
        lambda axes: draw_ratios(axes, ratios, targets, "speed / that of workers apart"),
    )


def _group(
    group: Group, models: Sequence[str], on_gpus: bool, path: Path, settings: Settings
) -> dict[str, Any]:
    """Return the turns of every model, as the first worker has timed them."""
    print(f"-- scaling: {group.label()}", flush=True)
    script = "cifar_horovod" if group.engine == "horovod" else "cifar"
    worker = ["-m", "bench.scaling", script, str(path), str(settings.scale), ",".join(models)]
    hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        engine_command(group.engine, group.workers, *worker),
        env=process_environment(group.threads, **hidden),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(path.read_text())


def work(script: str, path: Path, scale: float, models: Iterable[str]) -> None:
    """Measure the models as one worker of a group; rank 0 writes what it has measured."""
    comm = engine_class(script).join(timeout=600)
    log.set_rank(comm.rank)
    found = {name: measure_model(find_recipe(name), comm, scale) for name in models}
    if comm.is_main_process:
        write_text(path, json.dumps(found))
    comm.close()


def measure_model(recipe: Recipe, comm: Comm, scale: float) -> Turns:
    """Let the ways of training take turns, in the memory format that a long run would have."""
    ways = WAYS if comm.world_size > 1 else {"all-reduce": Way()}
    memory_format = "auto"
    trainings: dict[str, Training] = {}
    for name, way in ways.items():
        flags = ("--epochs", str(EPOCHS), "--memory-format", memory_format, *way.flags)
        trainings[name] = short_epochs(recipe, BATCH, comm, *flags, lockstep=way.lockstep)
        memory_format = trainings[name].memory_format
    for training in trainings.values():
        training.train(2)  # Pays for memory and connections; DDP then chooses other buckets.
    synced = trainings["all-reduce"]
    once = timed(partial(synced.train, 1), comm.device)
    steps = comm.all_reduce_max(max(1, round(TURN * scale / once)))
    affordable = int(LONGEST / (len(trainings) * steps * once))
    turns = comm.all_reduce_max(max(2, min(TURNS, affordable)))

    def turn(training: Training) -> float:
        comm.barrier()
        return timed(partial(training.train, steps), comm.device)

    seconds = measure({name: partial(turn, one) for name, one in trainings.items()}, turns)
    for training in trainings.values():
        training.close()
    return Turns(steps * BATCH, median(synced.loop.times.data), steps, seconds)


def table(
    found: Found,
) -> tuple[list[tuple[str, ...]], dict[str, Ratio], dict[str, float]]:
    """Return the rows, and for the plot the speeds over those of workers apart, and targets."""
    rows: list[tuple[str, ...]] = [
        ("model", "group", "images/s", "data", "compute", "waiting", "sending",
         "of apart", "target", "of dist", "target")
    ]  # fmt: skip
    ratios: dict[str, Ratio] = {}
    targets: dict[str, float] = {}
    for name, groups in found.items():
        for group, rounds in groups.items():
            label = f"{name}, {group.label()}"
            kept = together([turns.kept() for turns in rounds])
            dist = groups.get(group._replace(engine="dist"))
            against, of_dist = None, None
            if group.engine == "horovod" and dist:
                against = ratio([t.speed() for t in rounds], [t.speed() for t in dist])
                of_dist = HOROVOD_OF_DDP.get(name)
            wanted = OF_APART.get(name) if group.engine == "dist" else None
            if kept:
                ratios[label] = kept
                if wanted:
                    targets[label] = wanted
            parts = zip(*(turns.parts() for turns in rounds), strict=True)
            rows.append(
                (
                    name,
                    group.label(),
                    f"{median(turns.speed() for turns in rounds):,.0f}",
                    *(f"{median(part):.0%}" for part in parts),
                    kept.percent() if kept else "-",
                    f">= {wanted:.0%}" if wanted else "-",
                    against.percent() if against else "-",
                    f">= {of_dist:.0%}" if of_dist else "-",
                )
            )
    return rows, ratios, targets


def together(ratios: Iterable[Ratio | None]) -> Ratio | None:
    """Return the rounds' ratios as one: the median of the medians, and the range of all turns."""
    known = [one for one in ratios if one]
    if not known:
        return None
    return Ratio(
        median(one.median for one in known),
        min(one.least for one in known),
        max(one.most for one in known),
    )


def verdict(name: str, groups: Mapping[Group, Sequence[Turns]]) -> list[str]:
    """Return whether the largest group of DDP workers beats one process with as many threads."""
    most = max(group.workers for group in groups)
    if most == 1:
        return ["one core: nothing to scale"]
    alone = max((group for group in groups if group.workers == 1), key=lambda g: g.threads)
    gain = ratio(
        [turns.speed() for turns in groups[Group("dist", most)]],
        [turns.speed() for turns in groups[alone]],
    )
    pays = "more workers pay" if gain.median > 1 else "more workers do not pay"
    return [f"{name}: {most} workers are {gain} times as fast as {alone.label()}: {pays} here"]


if __name__ == "__main__":
    # The launcher may put --local-rank before them.
    work(sys.argv[-4], Path(sys.argv[-3]), float(sys.argv[-2]), sys.argv[-1].split(","))
    exit_process(0)
