"""The program's own training, put together by utils/training/build.py, to be measured in parts."""

import contextlib
import io
from collections.abc import Sequence
from itertools import cycle, islice

from utils.checkpoint.train_state import TrainState
from utils.config.args import parse_args
from utils.config.recipes import Recipe
from utils.config.schema import Config
from utils.data.datasets import Dataset
from utils.distributed.comm import Comm
from utils.distributed.signals import SignalHandler
from utils.errors import NotFinite
from utils.runtime import device
from utils.training import build
from utils.training.cuda_graph import on_stream

# The rate is small: a network that diverges computes with other numbers, at another speed.
RATE = 1e-3


def constant_rate(recipe: Recipe, *flags: str) -> Config:
    """Return the configuration of a recipe at one small learning rate, with more flags."""
    rate = ["--lr", str(RATE), "--warmup-steps", "0", "--epochs", "1"]
    return parse_args([*recipe.flags, *rate, *flags])


class Training:
    """The training of cifar.py, with all that a step of a real run does, but nothing is saved.

    Args:
        config: The configuration.
        data: The images.
        comm: The engine.
        lockstep: Let the workers wait for each other after each step.

    Attributes:
        splits: The sets of images.
        plan: The steps of a whole epoch.
        model: The raw network.
        memory_format: The format of the activations.
        recorder: Records the step as a CUDA graph; None where steps run eagerly.
        optimizer: The optimizer as the loop uses it.
        loop: The loop over steps.
    """

    def __init__(self, config: Config, data: Dataset, comm: Comm, lockstep: bool = False) -> None:
        """Assemble everything; every rank must call this."""
        self.comm = comm
        self.lockstep = lockstep
        device.configure(config.hardware, config.train.seed)
        self.splits = build.splits(data, config, comm)
        self.plan = build.plan(config, len(self.splits.train), comm)
        self.model, self.memory_format = build.model(config, data, self.splits, None, comm)
        self.evaluator = build.evaluator(self.model, config, comm)
        self.recorder = build.recorder(config, self.splits.train.storage_device, comm)
        with on_stream(self.recorder):
            wrapped, self.optimizer = build.optimizer(
                self.model, self.plan.schedule.base, self.recorder, config, comm
            )
            self.loop = build.train_loop(
                wrapped, self.optimizer, self.splits.train, self.plan, self.recorder, config, comm
            )
        self.signals = SignalHandler(comm, ())

    def train(self, steps: int) -> None:
        """Train one epoch of this many steps, over and over the plan's batches."""
        self.train_on(list(islice(cycle(self.plan.batch_slices), steps)))

    def train_on(self, batch_slices: Sequence[tuple[int, int]]) -> None:
        """Train one epoch of these global batches."""
        with on_stream(self.recorder), _no_progress():
            self.loop.train_epoch(TrainState(), self._after_step, _stop, batch_slices)

    def evaluate(self) -> None:
        """Score the network on the whole test set."""
        with _no_progress():
            self.evaluator(self.splits.test)

    def _after_step(self, _: int) -> None:
        self.signals.poll()
        if self.lockstep:
            self.comm.barrier()

    def close(self) -> None:
        """Leave nothing on its way, and destroy the CUDA graph."""
        self.signals.close()
        self.loop.close()


def _no_progress() -> contextlib.redirect_stdout:
    """Return a context in which the lines of a progress bar go nowhere."""
    return contextlib.redirect_stdout(io.StringIO())


def _stop(error: NotFinite) -> None:
    raise error
