"""The training loop against its floor: forward, backward and update on one constant batch."""

import contextlib
import copy
import io
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from bench.common import Ratio, Result, Settings, draw_ratios, measure, ratio, timed
from utils.checkpoint.train_state import Position
from utils.config.args import parse_args
from utils.config.recipes import Recipe, find_recipe
from utils.data import sampling as order
from utils.data import synthetic
from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm, Exchange, pick_device
from utils.distributed.signals import Interrupt
from utils.metrics.meter import Meter
from utils.metrics.step_times import StepTimes
from utils.runtime.malloc import keep_freed_memory
from utils.runtime.memory_format import lay_out
from utils.startup import PAD, build_model, make_reproducible
from utils.training.optim import build_optimizer
from utils.training.step import Step
from utils.training.trainer import train_one_epoch

# Batch on a CPU, where a step of the wide networks with 128 images would take half a minute.
BATCHES = {
    "alexnet": 128, "resnet20": 128, "vgg19_bn": 32, "resnet110": 16, "preresnet110": 16,
    "wrn28_10": 2, "resnext29_8x64d": 2, "densenet_bc_100_12": 8,
}  # fmt: skip
SMALL, LARGE = 4, 128  # any other network's on a CPU, and all networks' on a GPU
TARGETS = {"alexnet": 0.95, "resnet20": 0.97}
ROUNDS = 20
TURN = 0.6  # seconds that an arm trains at a time, and a step at least
# Seconds for all turns of a model, without and with a target. It gets two rounds at least.
MOST = (6.0, 20.0)
FAST = 1_800  # images a second of alexnet of a machine that can afford all benchmarks as they are
DIFFERENT = 8  # batches that a loop has images for
RATE = 1e-3  # small: a network that diverges computes with other numbers, at another speed


class Loop:
    """The training loop of the program, with all that a step of a real run does, in short epochs.

    Args:
        comm: the engine.
        model, optimizer: not wrapped.
        batch: images of a step, over all workers.
        memory_format: of the images, and of the network where the engine can send that.
        exchange: average the gradients; without, the workers train apart.
        lockstep: let the workers wait for each other after each step.
    """

    def __init__(
        self,
        comm: Comm,
        model: nn.Module,
        optimizer: Optimizer,
        batch: int,
        memory_format: str = "contiguous",
        exchange: bool = True,
        lockstep: bool = False,
    ) -> None:
        self.comm = comm
        self.lockstep = lockstep
        self.images = synthetic_set(DIFFERENT * batch, PAD, comm.device)
        self.bounds = order.batches(len(self.images), batch, comm.size)
        self.meter = Meter(comm.device)
        self.times = StepTimes()
        self.interrupt = Interrupt(comm, ())  # a benchmark does not save
        lay_out(model, (self.images,), memory_format, comm)
        wrapped = model
        if exchange:
            wrapped, optimizer = comm.wrap(model, optimizer, Exchange())
        looks = "stop" if exchange and comm.device.type == "cpu" else None
        self.step = Step(comm, wrapped, optimizer, "off", on_nan=looks)

    def train(self, steps: int) -> None:
        """One epoch of so many steps."""
        bounds = [self.bounds[k % DIFFERENT] for k in range(steps)]
        with contextlib.redirect_stdout(io.StringIO()):  # a progress bar that no terminal shows
            train_one_epoch(
                self.step,
                None,
                self.meter,
                self.images,
                bounds,
                [RATE] * steps,
                Position(),
                0,
                self.comm,
                self.times,
                self._after_step,
            )

    def _after_step(self, _: int) -> None:
        self.interrupt.poll()
        if self.lockstep:
            self.comm.barrier()

    def close(self) -> None:
        """Leave nothing on its way."""
        self.interrupt.close()


class Bare:
    """The floor: a network trained on one batch, by nothing but what training cannot do without."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor):
        self.model = model
        self.optimizer = optimizer
        self.images = images
        self.labels = labels

    def train(self, steps: int) -> None:
        """Forward, backward, update."""
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()

    @torch.inference_mode()
    def evaluate(self, passes: int) -> None:
        """Forward only."""
        self.model.eval()
        for _ in range(passes):
            self.model(self.images)


def constant_batch(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(batch, 3, 32, 32) normalised images and (batch,) labels."""
    return synthetic_set(batch, 0, device).batch(torch.arange(batch, device=device))


def synthetic_set(count: int, pad: int, device: torch.device) -> ImageSet:
    """Images of synthetic10."""
    images, labels = synthetic.generate(10, train=True, count=count)
    return ImageSet(images, labels, *synthetic.STATISTICS, device=device, pad=pad)


def bare_loop(recipe: Recipe, batch: int, device: torch.device) -> Bare:
    """The floor of a recipe."""
    return Bare(*network(recipe, device), *constant_batch(batch, device))


def network(recipe: Recipe, device: torch.device) -> tuple[nn.Module, Optimizer]:
    """The network of a recipe and its optimizer, in a process that is set up as for training."""
    options = parse_args(recipe.flags)
    make_reproducible(0, deterministic=False)
    if device.type == "cpu":
        keep_freed_memory()
    model = build_model(options, 10).to(device)
    return model, build_optimizer(model, RATE, options.momentum, options.weight_decay, False)


def pace(threads: int) -> float:
    """The scale at which all benchmarks take less than ten minutes on this machine; 1 at most."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    device = pick_device(0, 1)
    try:
        bare = bare_loop(find_recipe("alexnet"), 128, device)
        bare.train(1)
        seconds = timed(partial(bare.train, 5), device)
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
    """Seconds of each turn of loop and floors, with the batch and the steps of a turn."""
    comm = Comm()
    on_gpu = comm.device.type == "cuda"
    batch = LARGE if on_gpu else BATCHES.get(recipe.name, SMALL)
    bare = bare_loop(recipe, batch, comm.device)
    copied = copy.deepcopy(bare.model).to(memory_format=torch.channels_last)
    last = Bare(
        copied,
        SGD(copied.parameters(), **bare.optimizer.defaults),
        bare.images.contiguous(memory_format=torch.channels_last),
        bare.labels,
    )
    for floor in (bare, last):
        floor.train(1)  # pays for memory and the choice of algorithms
    once = timed(partial(bare.train, 1), comm.device)
    steps = max(1, round(TURN * settings.scale / once))

    # Loop and floor share the network: their memory is the same, too.
    loop = Loop(comm, bare.model, bare.optimizer, batch)
    loop.train(1)
    arms: dict[str, Callable[[], None]] = {
        "loop": partial(loop.train, steps),
        "floor": partial(bare.train, steps),
        "channels-last floor": partial(last.train, steps),
    }
    timers = {name: partial(timed, action, comm.device) for name, action in arms.items()}
    affordable = int(MOST[recipe.name in TARGETS] / (len(timers) * steps * once))
    rounds = settings.rounds or max(2, min(ROUNDS, affordable))
    seconds = measure(timers, rounds)
    loop.close()
    return {"batch": batch, "steps": steps, "seconds": seconds}
