"""Scoring a network on a whole set, exactly, and what is said about it."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from utils.checkpoint import format as checkpoint
from utils.checkpoint.train_state import Position
from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.errors import TrainingError
from utils.metrics.confusion import Confusion
from utils.metrics.meter import Meter, Metrics
from utils.metrics.run_log import ProgressBar
from utils.metrics.step_times import StepTimes
from utils.runtime.precision import at_least_float32, autocast
from utils.startup import Saved


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    batch: int,
    amp: str,
    comm: Comm,
    confusion: Confusion | None = None,
    after_batch: Callable[[], Any] = lambda: None,
) -> Metrics:
    """Score the model on a whole set, each worker a part of it.

    The batches are the same for any number of workers; worker r computes batches r, r + size, ...
    Nothing is padded or counted twice, and an image's logits do not depend on who computes them.
    Batch norm uses the average of the workers' statistics, which stay as they are.

    Args:
        model: the raw model.
        images: the set.
        batch: images per forward pass.
        amp: "off" or "bf16".
        comm: the engine.
        confusion: counts which classes are taken for which, if given.
        after_batch: called equally often on every worker.

    Raises:
        TrainingError: the workers have not counted every image exactly once.
    """
    model.eval()
    batches = torch.arange(len(images), device=images.home).split(batch)
    parts = batches[comm.rank :: comm.size]
    meter = Meter(comm.device)
    times = StepTimes()
    bar = ProgressBar("valid", len(parts), comm.is_main)
    with comm.averaged_buffers(model):  # one sum over the workers
        for k, index in enumerate(parts):
            times.begin()
            inputs, labels = images.batch(index)
            times.data_ready()
            with autocast(comm.device, amp):
                output = model(inputs)
            output = at_least_float32(output)
            loss = functional.cross_entropy(output, labels, reduction="sum")
            meter.update(loss, output, labels)
            if confusion:
                confusion.update(output, labels)
            times.step_done(loss, len(index))
            if bar.due(k + 1):
                bar.show(k + 1, meter.local(), times)
            after_batch()
        if len(parts) < math.ceil(len(batches) / comm.size):
            after_batch()  # the others have one batch more
    bar.finish()
    result = meter.reduced(comm)  # one sum over the workers
    if confusion:
        confusion.reduce(comm)  # another one
    if result.images != len(images):
        raise TrainingError(f"evaluated {result.images} images of {len(images)}")
    return result


def evaluate_on(
    images: ImageSet,
    model: nn.Module,
    comm: Comm,
    options: argparse.Namespace,
    **more: Any,
) -> Metrics:
    """``evaluate`` with the batch and precision of the options."""
    return evaluate(model, images, options.test_batch, options.amp, comm, **more)


def report_evaluation(
    result: Metrics,
    saved: Saved | None,
    confusion: Confusion | None,
    classes: Sequence[str],
    comm: Comm,
) -> None:
    """Print what --evaluate has found; the confusion matrix becomes a picture."""
    if not comm.is_main or saved is None:
        return
    print(f"{saved.path}, after epoch {saved.state.get('epoch', 'unknown')}")
    if confusion:
        print("\n".join(confusion.lines(classes)))
        picture = saved.path.parent / "confusion.png"
        confusion.draw(classes, picture)
        print(picture)
    print(
        f"Test Loss: {result.loss:.8f}, Test Acc: {result.top1:.2f} "
        f"({round(result.top1 * result.images / 100)} of {result.images}), top5 {result.top5:.2f}"
    )


def report_end(
    position: Position,
    model: nn.Module,
    valid_set: ImageSet,
    test_set: ImageSet,
    folder: Path,
    comm: Comm,
    options: argparse.Namespace,
    say: Any,
) -> None:
    """Print last and best accuracy, each by its name.

    With --val-split the two epochs were chosen on held-out images; the test set is used here for
    the first time.
    """
    if valid_set is test_set:
        say(f"\nLast acc: {position.acc:.2f} (epoch {position.epoch}, test set)")
        say(f"Best acc: {position.best_acc:.2f} (epoch {position.best_epoch}, chosen on the test "
            "set)")  # fmt: skip
        return
    last = evaluate_on(test_set, model, comm, options)
    path = folder / checkpoint.BEST
    best_state = checkpoint.parse(comm.from_main(lambda: checkpoint.read(path)), path, "", False)
    checkpoint.load_model(model, best_state, path, "the network of this run")
    best = evaluate_on(test_set, model, comm, options)
    say(f"\nLast acc: {last.top1:.2f} (epoch {position.epoch}, test set)")
    say(
        f"Best acc: {best.top1:.2f} (epoch {position.best_epoch}, test set; chosen by validation "
        f"accuracy {position.best_acc:.2f})"
    )
