"""Runs a training script with mistakes or faults planted in it, to prove what a check would find.

    python tools/fault_injection.py MISTAKE[+MISTAKE...] SCRIPT ARGUMENTS...

Each mistake is one that projects of this kind have really made; the faults are those of machines
and users. They are patches from outside: nothing in the training code knows of them.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # and not this folder, whose inspect.py would hide Python's

import numpy as np
import torch

from tools.commands import engine_class
from utils import engine, startup
from utils.checkpoint import format as checkpoint
from utils.data import sampling as order
from utils.distributed.comm import Comm, restarts_by_launcher
from utils.training import evaluation
from utils.training.step import Step


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

    def evaluate(model: Any, images: Any, batch: int, amp: str, comm: Comm, **more: Any) -> Any:
        missing = -len(images) % comm.size
        index = torch.arange(len(images) + missing) % len(images)
        padded = type(images).__new__(type(images))
        padded.__dict__ = {**images.__dict__}
        padded.windows, padded.labels = images.windows[index], images.labels[index]
        return real(model, padded, batch, amp, comm, **more)

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


def _before_step(number: int, action: Callable[[Step, list[Any]], Any], whole: bool) -> None:
    """Do something before step ``number``, on all workers or on the last one only, once.

    The action gets the step and its arguments: images and labels first.
    """
    real, done = Step.__call__, [0]

    def call(self: Step, *arguments: Any, **named: Any) -> Any:
        given = list(arguments)
        if done[0] == number and (whole or self.comm.rank == self.comm.size - 1):
            action(self, given)
        done[0] += 1
        return real(self, *given, **named)

    Step.__call__ = call


def _send(name: str) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), getattr(signal, name))


def _flip_last_bit(step: Step, _: Any) -> None:
    # Of the largest value: an update may round the difference away where the exponent grows.
    flat = list(step.model.parameters())[-1].detach().view(-1)
    place = int(flat.abs().argmax())
    value = flat[place : place + 1]
    value.copy_(torch.from_numpy(np.nextafter(value.numpy(), np.inf)))


def _spoil(_: Step, arguments: list[Any]) -> None:
    arguments[0] = arguments[0] * float("nan")


def _fail(*_: Any) -> None:
    raise RuntimeError("planted")


def _stand_still(*_: Any) -> None:
    time.sleep(1000)


def _fill_disk(*_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def _empty_disk(*_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def in_evaluation(name: str) -> None:
    """A signal comes in the first evaluation."""
    real, sent = evaluation.ImageSet.batch, [False]

    def batch(self: Any, index: Any, augmentation: Any = None) -> Any:
        if augmentation is None and not sent[0]:
            sent[0] = True
            os.kill(os.getpid(), getattr(signal, name))
        return real(self, index, augmentation)

    evaluation.ImageSet.batch = batch


def other_option() -> None:
    """The last worker is started with another learning rate."""
    real = engine.parse_args

    def parse(argv: Any) -> Any:
        options = real(argv)
        if _last_rank():
            options.lr *= 2
        return options

    engine.parse_args = parse


def other_files() -> None:
    """The last worker finds no checkpoint where the others find one."""
    if _last_rank():
        checkpoint.LATEST = checkpoint.PREVIOUS = "nowhere"


def other_data() -> None:
    """The last worker reads another set of images."""
    real = engine.load_dataset

    def load(*arguments: Any, **named: Any) -> Any:
        data = real(*arguments, **named)
        if _last_rank():
            data.train_labels[0] = (data.train_labels[0] + 1) % 10
        return data

    engine.load_dataset = load


# By name, what happens before step N for NAME-N, and whether on all workers.
AT_STEP: dict[str, tuple[Callable[..., Any], bool]] = {
    "kill": (_send("SIGKILL"), True),
    "kill-one": (_send("SIGKILL"), False),
    "term": (_send("SIGTERM"), False),
    "int": (_send("SIGINT"), True),
    "usr1": (_send("SIGUSR1"), False),
    "usr2": (_send("SIGUSR2"), False),
    "stop": (_send("SIGSTOP"), False),
    "flip": (_flip_last_bit, False),
    "nan": (_spoil, False),
    "raise": (_fail, False),
    "sleep": (_stand_still, False),
    "full": (_fill_disk, True),
    "free": (_empty_disk, True),
}

MISTAKES: dict[str, Callable[[], None]] = {
    "same-order": same_order,
    "summed-gradients": summed_gradients,
    "own-mean": own_mean,
    "lost-momentum": lost_momentum,
    "padded-evaluation": padded_evaluation,
    "lost-rate": lost_rate,
}

# What no training is to notice but to survive.
FAULTS: dict[str, Callable[[], None]] = {
    "term-in-evaluation": lambda: in_evaluation("SIGTERM"),
    "other-option": other_option,
    "other-files": other_files,
    "other-data": other_data,
}


def _last_rank() -> bool:
    rank = int(os.environ.get("RANK", os.environ.get("HOROVOD_RANK", 0)))
    return rank == int(os.environ.get("WORLD_SIZE", os.environ.get("HOROVOD_SIZE", 1))) - 1


def plant(mistake: str) -> None:
    """Plant one mistake or fault; several steps are NAME-FIRST..LAST."""
    kind, _, steps = mistake.rpartition("-")
    if kind in AT_STEP:
        action, whole = AT_STEP[kind]
        first, _, last = steps.partition("..")
        for number in range(int(first), int(last or first) + 1):
            _before_step(number, action, whole)
    elif mistake in FAULTS:
        FAULTS[mistake]()
    elif mistake != "none":
        MISTAKES[mistake]()


def plant_all(mistakes: str) -> None:
    """Plant what is joined by +; faults happen once, and not again in a job that is restarted."""
    for mistake in mistakes.split("+"):
        if mistake in MISTAKES or not restarts_by_launcher():
            plant(mistake)


def arguments() -> list[str]:
    """Of the command line; torch.distributed.launch puts the local rank before them."""
    return [word for word in sys.argv[1:] if not word.startswith("--local-rank")]


def main() -> int:
    """Plant the mistake and run the script."""
    mistakes, script, *rest = arguments()
    plant_all(mistakes)
    return engine.main(engine_class(script), rest)


if __name__ == "__main__":
    engine.leave(main())
