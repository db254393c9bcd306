"""The training loop against its floor: forward, backward and update on one constant batch."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from bench.common import Ratio, Result, Settings, draw_ratios, measure, ratio, timed
from bench.training import Training, constant_rate
from utils.config.recipes import Recipe, find_recipe
from utils.distributed.comm import Comm
from utils.training import build

# The batch on a CPU, where a step of the wide networks with 128 images would take half a minute.
BATCHES = {
    "alexnet": 128, "resnet20": 128, "vgg19_bn": 32, "resnet110": 16, "preresnet110": 16,
    "wrn28_10": 2, "resnext29_8x64d": 2, "densenet_bc_100_12": 8,
}  # fmt: skip
SMALL, LARGE = 4, 128  # Any other network's batch on a CPU, and that of all networks on a GPU.
TARGETS = {"alexnet": 0.95, "resnet20": 0.97}
ROUNDS = 20
TURN = 0.6  # The seconds that a variant trains at a time; a step at least.
# The seconds for all turns of a model, without and with a target. It gets two rounds at least.
MOST = (6.0, 20.0)
FAST = 1_800  # Images a second of alexnet on a machine that can afford all benchmarks as they are.
DIFFERENT = 8  # The batches that a loop has images for.


def short_epochs(
    recipe: Recipe, batch: int, comm: Comm, *flags: str, lockstep: bool = False
) -> Training:
    """Return the training of a recipe on a few synthetic images.

    Args:
        recipe: The recipe.
        batch: The images of a step, over all workers; the test set is one such batch.
        comm: The engine.
        flags: More flags.
        lockstep: Let the workers wait for each other after each step.
    """
    config = constant_rate(
        recipe, "-d", "synthetic10", "--train-batch", str(batch),
        "--train-size", str(DIFFERENT * batch), "--test-size", str(batch),
        "--memory-format", "contiguous", "--graph", "off", *flags,
    )  # fmt: skip
    return Training(config, build.dataset(config.data), comm, lockstep)


class Bare:
    """The floor: a network trained on one batch, by nothing but what training cannot do without.

    Args:
        training: The training whose network and optimizer it uses, and so the same memory: nothing
            but the loop differs.

    Attributes:
        images: (B, 3, 32, 32) normalised images, the whole test set.
        labels: (B,) int64.
    """

    def __init__(self, training: Training) -> None:
        """Make the batch."""
        self.model = training.model
        self.optimizer = training.optimizer
        test = training.splits.test
        self.images, self.labels = test.batch(torch.arange(len(test), device=test.storage_device))

    def train(self, steps: int) -> None:
        """Run forward, backward and update."""
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()

    @torch.inference_mode()
    def evaluate(self, passes: int) -> None:
        """Run forward only."""
        self.model.eval()
        for _ in range(passes):
            self.model(self.images)


def pace(threads: int) -> float:
    """Return the scale at which all benchmarks take less than ten minutes here; 1 at most."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    comm = Comm()
    try:
        bare = Bare(short_epochs(find_recipe("alexnet"), 128, comm))
        bare.train(1)
        seconds = timed(partial(bare.train, 5), comm.device)
    finally:
        torch.set_num_threads(before)
    return min(1.0, 5 * 128 / seconds / FAST)


def run(settings: Settings) -> Result:
    """Measure the loop and the floors of every model, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    raw = {}
    try:
        for name in settings.models or BATCHES:
            print(f"-- step: {name}", flush=True)
            recipe = find_recipe(name)
            raw[recipe.name] = measure_model(recipe, settings)
    finally:
        torch.set_num_threads(threads)

    rows = [("model", "batch", "floor, images/s", "images/s", "% of floor", "target",
             "floor in channels-last")]  # fmt: skip
    ratios: dict[str, Ratio] = {}
    for name, numbers in raw.items():
        seconds, images = numbers["seconds"], numbers["batch"] * numbers["steps"]
        ratios[name] = ratio(seconds["floor"], seconds["loop"])
        rows.append(
            (
                name,
                str(numbers["batch"]),
                f"{images / median(seconds['floor']):,.1f}",
                f"{images / median(seconds['loop']):,.1f}",
                ratios[name].percent(),
                f">= {TARGETS[name]:.0%}" if name in TARGETS else "-",
                ratio(seconds["floor"], seconds["channels-last floor"]).percent(),
            )
        )
    return Result(
        f"step: training loop, {settings.threads} threads",
        rows,
        [
            "floor: forward, backward and update on one constant batch, nothing else; in "
            "channels-last: its speed in that memory format over that in the default one"
        ],
        raw,
        lambda axes: draw_ratios(axes, ratios, TARGETS, "share of the floor"),
    )


def measure_model(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """Return the seconds of each turn of loop and floors, and the batch and the steps of a turn."""
    comm = Comm()
    on_gpu = comm.device.type == "cuda"
    batch = LARGE if on_gpu else BATCHES.get(recipe.name, SMALL)
    training = short_epochs(recipe, batch, comm)
    floor = Bare(training)
    channels_last = Bare(short_epochs(recipe, batch, comm, "--memory-format", "channels_last"))
    for bare in (floor, channels_last):
        bare.train(1)  # Pays for memory and the choice of algorithms.
    once = timed(partial(floor.train, 1), comm.device)
    steps = max(1, round(TURN * settings.scale / once))
    training.train(1)
    variants: dict[str, Callable[[], None]] = {
        "loop": partial(training.train, steps),
        "floor": partial(floor.train, steps),
        "channels-last floor": partial(channels_last.train, steps),
    }
    timers = {name: partial(timed, action, comm.device) for name, action in variants.items()}
    affordable = int(MOST[recipe.name in TARGETS] / (len(timers) * steps * once))
    rounds = settings.rounds or max(2, min(ROUNDS, affordable))
    seconds = measure(timers, rounds)
    training.close()
    return {"batch": batch, "steps": steps, "seconds": seconds}
