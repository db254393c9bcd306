"""Runs a training script with one mistake planted in it, to prove that a check would find it.

    python tools/planted.py MISTAKE SCRIPT ARGUMENTS...

Each mistake is one that projects of this kind have really made. They are patches from outside:
nothing in the training code knows of them.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # and not this folder, whose inspect.py would hide Python's

import numpy as np
import torch

from tools.arms import engine_class
from utils import engine, evaluation, order, startup
from utils.comm import Comm
from utils.step import Step


def same_order() -> None:
    """Every epoch has the order of the first: set_epoch forgotten."""
    real = order.permutation
    order.permutation = lambda count, seed, epoch: real(count, seed, 0)


def summed_gradients() -> None:
    """Gradients are added up over the workers, not averaged."""
    real = Step._backward
    Step._backward = lambda self, images, labels, scale: real(
        self, images, labels, scale * self.comm.size
    )


def own_mean() -> None:
    """Each worker takes the mean over its own share, as if all shares were equal."""
    real = Step._backward
    Step._backward = lambda self, images, labels, scale: real(self, images, labels, 1 / len(labels))


def lost_momentum() -> None:
    """On resume only rank 0 gets the optimizer's state: a broadcast forgotten."""
    real = engine.checkpoint.load_optimizer
    rank = int(os.environ.get("RANK", os.environ.get("HOROVOD_RANK", 0)))

    def load(optimizer: Any, state: Any, path: Any) -> bool:
        return real(optimizer, state, path) if rank == 0 else False

    engine.checkpoint.load_optimizer = load


def padded_evaluation() -> None:
    """The test set is filled up until all workers have equally many images."""
    real = evaluation.evaluate

    def evaluate(model: Any, images: Any, batch: int, amp: str, comm: Comm, *rest: Any) -> Any:
        missing = -len(images) % comm.size
        index = torch.arange(len(images) + missing) % len(images)
        padded = type(images).__new__(type(images))
        padded.__dict__ = {**images.__dict__}
        padded.windows, padded.labels = images.windows[index], images.labels[index]
        return real(model, padded, batch, amp, comm, *rest)

    evaluation.evaluate = evaluate


def lost_rate() -> None:
    """On resume the learning rate starts again from the top of its schedule."""
    real = startup.start_position

    def start(options: Any, saved: Any, shape: Any) -> Any:
        position = real(options, saved, shape)
        if saved:
            options.schedule = [epoch + position.epoch for epoch in options.schedule]
        return position

    engine.start_position = start


def _kill_at_step(number: int) -> None:
    """kill-N: the process ends without warning after N steps, as by kill -9."""
    real, done = Step.__call__, [0]

    def call(self: Step, *arguments: Any) -> Any:
        if done[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        return real(self, *arguments)

    Step.__call__ = call


def _one_bit(number: int) -> None:
    """flip-N: after N steps one value on the last rank differs in its last bit."""
    real, done = Step.__call__, [0]

    def call(self: Step, *arguments: Any) -> Any:
        done[0] += 1
        if done[0] == number and self.comm.rank == self.comm.size - 1:
            value = list(self.model.parameters())[-1].detach().view(-1)[:1]
            value.copy_(torch.from_numpy(np.nextafter(value.numpy(), np.inf)))
        return real(self, *arguments)

    Step.__call__ = call


MISTAKES: dict[str, Callable[[], None]] = {
    "same-order": same_order,
    "summed-gradients": summed_gradients,
    "own-mean": own_mean,
    "lost-momentum": lost_momentum,
    "padded-evaluation": padded_evaluation,
    "lost-rate": lost_rate,
}


def main() -> int:
    """Plant the mistake and run the script."""
    # torch.distributed.launch puts the local rank before the other arguments.
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local-rank")]
    mistake, script, *rest = arguments
    kind, _, number = mistake.rpartition("-")
    if kind in ("kill", "flip"):
        {"kill": _kill_at_step, "flip": _one_bit}[kind](int(number))
    elif mistake != "none":
        MISTAKES[mistake]()
    return engine.main(engine_class(script), rest)


if __name__ == "__main__":
    engine.leave(main())
