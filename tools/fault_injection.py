"""Run a training script with injected mistakes or faults, to prove what a check would find.

    python tools/fault_injection.py MISTAKE[+MISTAKE...] SCRIPT ARGUMENTS...

Each mistake is one that projects of this kind have really made; the faults are those of machines
and users. They are patches from outside, of the names by which the training code looks things up:
nothing in that code knows of them.
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This folder would come first on the path, and its inspect.py would hide that of Python, which
# dataclasses imports.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import replace

import numpy as np
import torch

from cifar import run
from tools.commands import engine_class
from utils.checkpoint import format as checkpoint_format
from utils.checkpoint import restore
from utils.checkpoint.train_state import TrainState
from utils.data import sampling
from utils.data.image_set import ImageSet
from utils.distributed.comm import launcher_restart_count
from utils.runtime import exit_codes
from utils.runtime.exit_codes import exit_process, run_worker
from utils.training import build
from utils.training.evaluation import Evaluator
from utils.training.plan import EpochPlan
from utils.training.step import Step


def _patch(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a function of a module or class.

    Args:
        owner: The module or class.
        name: The name under which callers look the function up.
        wrap: Makes the new function from the old one.

    Raises:
        AttributeError: There is no such function any more.
    """
    setattr(owner, name, wrap(getattr(owner, name)))


def _rank_from_env() -> int:
    return int(os.environ.get("RANK", os.environ.get("HOROVOD_RANK", 0)))


def _is_last_rank() -> bool:
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("HOROVOD_SIZE", 1)))
    return _rank_from_env() == world_size - 1


def same_order() -> None:
    """Give every epoch the order of the first, as where set_epoch is forgotten."""
    _patch(sampling, "permutation", lambda real: lambda count, seed, epoch: real(count, seed, 0))


def summed_gradients() -> None:
    """Add the gradients up over the workers instead of averaging them."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda step, images, labels, scale: real(
            step, images, labels, scale * step.comm.world_size
        )

    _patch(Step, "_backward", wrap)


def own_mean() -> None:
    """Let each worker take the mean over its own shard, as if all shards were equal."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda step, images, labels, scale: real(step, images, labels, 1 / len(labels))

    _patch(Step, "_backward", wrap)


def lost_momentum() -> None:
    """On resume give only rank 0 the optimizer's state, as where a broadcast is forgotten."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def load(*arguments: Any) -> bool:
            return real(*arguments) if _rank_from_env() == 0 else False

        return load

    _patch(restore, "load_optimizer", wrap)


def padded_evaluation() -> None:
    """Fill the test set up until all workers have equally many images."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(evaluator: Evaluator, images: ImageSet, *more: Any, **named: Any) -> Any:
            missing = -len(images) % evaluator.comm.world_size
            index = torch.arange(len(images) + missing) % len(images)
            padded = object.__new__(ImageSet)
            padded.__dict__ = {**images.__dict__}
            padded.windows, padded.labels = images.windows[index], images.labels[index]
            return real(evaluator, padded, *more, **named)

        return evaluate

    _patch(Evaluator, "__call__", wrap)


def lost_rate() -> None:
    """On resume start the learning rate again from the top of its schedule."""
    first_epoch = 0

    def wrap_start(real: Callable[..., TrainState]) -> Callable[..., TrainState]:
        def start(train: Any, loaded: Any, *plan: Any) -> TrainState:
            nonlocal first_epoch
            state = real(train, loaded, *plan)
            first_epoch = state.epoch if loaded else 0
            return state

        return start

    def wrap_rate(real: Callable[..., float]) -> Callable[..., float]:
        return lambda plan, epoch, step: real(plan, epoch - first_epoch, step)

    _patch(TrainState, "start", wrap_start)
    _patch(EpochPlan, "learning_rate", wrap_rate)


def _before_step(
    number: int, action: Callable[[Step, list[Any]], Any], on_all_workers: bool
) -> None:
    """Do something once before a step, on all workers or on the last one only.

    Args:
        number: The step of the process, counted from 0.
        action: What is done; it gets the step and its arguments, images and labels first.
        on_all_workers: Whether all workers do it.
    """

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        done = 0

        def call(step: Step, *arguments: Any, **named: Any) -> Any:
            nonlocal done
            given = list(arguments)
            is_last = step.comm.rank == step.comm.world_size - 1
            if done == number and (on_all_workers or is_last):
                action(step, given)
            done += 1
            return real(step, *given, **named)

        return call

    _patch(Step, "__call__", wrap)


def _send_signal(name: str) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), getattr(signal, name))


def _flip_last_bit(step: Step, _: Any) -> None:
    # The largest value is changed: an update may round the difference away where the exponent
    # grows.
    flat = list(step.model.parameters())[-1].detach().view(-1)
    place = int(flat.abs().argmax())
    value = flat[place : place + 1]
    value.copy_(torch.from_numpy(np.nextafter(value.numpy(), np.inf)))


def _make_not_finite(_: Step, arguments: list[Any]) -> None:
    arguments[0] = arguments[0] * float("nan")


def _raise(*_: Any) -> None:
    raise RuntimeError("planted")


def _sleep(*_: Any) -> None:
    time.sleep(1000)


def _fill_disk(*_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def _free_disk(*_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def signal_in_evaluation(name: str) -> None:
    """Send a signal to this process in the first evaluation.

    Args:
        name: The name of the signal, such as "SIGTERM".
    """

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        sent = False

        def batch(images: ImageSet, index: Any, augmentation: Any = None) -> Any:
            nonlocal sent
            if augmentation is None and not sent:
                sent = True
                os.kill(os.getpid(), getattr(signal, name))
            return real(images, index, augmentation)

        return batch

    _patch(ImageSet, "batch", wrap)


def other_option() -> None:
    """Start the last worker with another learning rate."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def parse_args(argv: Any) -> Any:
            config = real(argv)
            if not _is_last_rank():
                return config
            return config.replace(train=replace(config.train, lr=2 * config.train.lr))

        return parse_args

    _patch(exit_codes, "parse_args", wrap)


def other_files() -> None:
    """Let the last worker find no checkpoint where the others find one."""
    if _is_last_rank():
        # They are names in the module of load_newest, which looks for these files.
        checkpoint_format.LATEST = checkpoint_format.PREVIOUS = "nowhere"


def other_data() -> None:
    """Let the last worker read another set of images."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def load_dataset(*arguments: Any, **named: Any) -> Any:
            data = real(*arguments, **named)
            if _is_last_rank():
                data.train_labels[0] = (data.train_labels[0] + 1) % 10
            return data

        return load_dataset

    _patch(build, "load_dataset", wrap)


# What happens before step N for NAME-N, by name, and whether on all workers.
AT_STEP: dict[str, tuple[Callable[..., Any], bool]] = {
    "kill": (_send_signal("SIGKILL"), True),
    "kill-one": (_send_signal("SIGKILL"), False),
    "term": (_send_signal("SIGTERM"), False),
    "int": (_send_signal("SIGINT"), True),
    "usr1": (_send_signal("SIGUSR1"), False),
    "usr2": (_send_signal("SIGUSR2"), False),
    "stop": (_send_signal("SIGSTOP"), False),
    "flip": (_flip_last_bit, False),
    "nan": (_make_not_finite, False),
    "raise": (_raise, False),
    "sleep": (_sleep, False),
    "full": (_fill_disk, True),
    "free": (_free_disk, True),
}

MISTAKES: dict[str, Callable[[], None]] = {
    "same-order": same_order,
    "summed-gradients": summed_gradients,
    "own-mean": own_mean,
    "lost-momentum": lost_momentum,
    "padded-evaluation": padded_evaluation,
    "lost-rate": lost_rate,
}

# What training has to survive, or to refuse.
FAULTS: dict[str, Callable[[], None]] = {
    "term-in-evaluation": lambda: signal_in_evaluation("SIGTERM"),
    "other-option": other_option,
    "other-files": other_files,
    "other-data": other_data,
}


def inject(mistake: str) -> None:
    """Inject one mistake or fault.

    Args:
        mistake: A name in MISTAKES or FAULTS, "none", or a name in AT_STEP with the step behind
            it, as NAME-STEP, or with several steps, as NAME-FIRST..LAST.
    """
    kind, _, steps = mistake.rpartition("-")
    if kind in AT_STEP:
        action, on_all_workers = AT_STEP[kind]
        first, _, last = steps.partition("..")
        for number in range(int(first), int(last or first) + 1):
            _before_step(number, action, on_all_workers)
    elif mistake in FAULTS:
        FAULTS[mistake]()
    elif mistake != "none":
        MISTAKES[mistake]()


def inject_all(mistakes: str) -> None:
    """Inject all that is joined by +; a fault does not happen again in a job that is restarted."""
    for mistake in mistakes.split("+"):
        if mistake in MISTAKES or not launcher_restart_count():
            inject(mistake)


def arguments() -> list[str]:
    """Return the command line; torch.distributed.launch puts the local rank before it."""
    return [word for word in sys.argv[1:] if not word.startswith("--local-rank")]


def main() -> int:
    """Inject the mistakes, run the script and return the exit code."""
    mistakes, script, *rest = arguments()
    inject_all(mistakes)
    return run_worker(engine_class(script), run, rest)


if __name__ == "__main__":
    exit_process(main())
