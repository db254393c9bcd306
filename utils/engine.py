"""The program behind both scripts: set up a run, train, evaluate, log, save.

Read ``run`` first. Everything that differs between the engines is behind ``comm``
(utils/comm.py); a line that communicates says what it does.
"""

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import model_arguments
from utils import checkpoint, order
from utils.augment import ImageSet
from utils.comm import Comm, Exchange
from utils.confusion import Confusion
from utils.data import load_dataset
from utils.errors import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    PeerFailed,
    TrainingError,
    UserError,
)
from utils.estimate import estimate
from utils.graph import CudaRecorder, StepGraph, wants_graph
from utils.logger import ProgressBar, RunLog, check_tensorboard
from utils.memory_format import lay_out
from utils.metrics import Meter, Metrics
from utils.optim import Schedule, build_optimizer, scaled_rate, set_learning_rate
from utils.options import model_arguments_of, parse_args, warnings
from utils.plot import draw, read_log
from utils.position import Position
from utils.precision import at_least_float32, autocast
from utils.provenance import write_args
from utils.replicas import check_replicas
from utils.startup import (
    PAD,
    Saved,
    build_model,
    build_sets,
    choose_tf32,
    claim_folder,
    compile_blocks,
    epoch_shape,
    find_checkpoint,
    global_batch,
    make_reproducible,
    memory_format_for,
    run_folder,
    select_gpus,
    start_lines,
    start_position,
    start_text,
    usable_precision,
)
from utils.step import Step
from utils.sync_batchnorm import convert_sync_batchnorm
from utils.trace import StepTimes


def main(engine: type[Comm], argv: Sequence[str] | None = None) -> int:
    """Run the program on this worker with an engine; returns the exit code."""
    rank = engine.launched_rank()
    try:
        options = parse_args(argv)
        select_gpus(options.gpu_id)
        comm = engine()
        try:
            run(comm, options)
        except Exception as error:
            if comm.lost_peer(error):
                raise PeerFailed(FAILED) from error
            raise
        finally:
            comm.close()
    except UserError as error:
        if rank != 0:
            # Bad input is bad on every rank and rank 0 says so once. Where it is not, the launcher
            # has not ended this worker after a moment, and the message must not get lost.
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except PeerFailed as error:
        time.sleep(3)  # the launcher takes the first worker that ends for the one that failed
        return error.code
    except TrainingError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        if rank == 0:
            print("\ninterrupted; --resume auto continues from the last checkpoint", flush=True)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return FAILED
    return 0


def leave(code: int) -> NoReturn:
    """End the process with an exit code, without taking the interpreter apart.

    The threads of a process group may still let go of a tensor while the interpreter shuts down,
    and such a thread aborts the whole process (seen with Gloo of torch 2.15).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(comm: Comm, options: argparse.Namespace) -> None:
    """Train, or evaluate a checkpoint, as the options say."""
    say = print if comm.is_main else _say_nothing
    make_reproducible(options.seed, options.deterministic)
    choose_tf32(options.tf32)
    if options.tensorboard:
        check_tensorboard()
    options.amp = usable_precision(comm, options.amp, say)
    with torch.device("meta"):
        build_model(options, classes=10)  # wrong model flags are found before any download
    saved = find_checkpoint(options)

    with comm.main_first():  # the others wait until downloads and caches are complete
        data = load_dataset(
            options.dataset,
            options.data,
            urls=options.data_url,
            archive=options.data_archive,
            md5=options.data_md5,
            stats=options.stats,
            train_size=options.train_size,
            test_size=options.test_size,
            workers=options.workers,
            notify=say,
        )
    train_set, valid_set, test_set = build_sets(data, options, comm)
    batch = global_batch(options, comm.size, len(train_set))

    model = build_model(options, len(data.classes)).to(comm.device, train_set.scale.dtype)
    memory_format = memory_format_for(model, options, saved, len(train_set), comm)
    lay_out(model, (train_set, valid_set, test_set), memory_format, comm)
    if options.sync_bn:
        convert_sync_batchnorm(model, comm)
    if saved:
        wanted = checkpoint.describe_model(
            options.arch, model_arguments_of(options) | {"num_classes": len(data.classes)}
        )
        checkpoint.load_model(model, saved.state, saved.path, wanted)
    if options.evaluate:
        confusion = Confusion(len(data.classes), comm.device) if options.per_class else None
        result = evaluate_on(test_set, model, comm, options, confusion)
        report_evaluation(result, saved, confusion, data.classes, comm)
        return

    if options.estimate:
        lines = estimate(model, train_set, len(valid_set), batch, options.epochs, options.amp, comm)
        say("\n".join(lines))
        return

    shape = epoch_shape(options, batch, len(train_set))
    position = start_position(options, saved, shape)
    rate = scaled_rate(options.lr, batch, options.lr_scaling)
    schedule = Schedule(rate, options.schedule, options.gamma, options.warmup_steps, options.warmup)
    if options.compile:
        compile_blocks(model)
    passes = options.backward_passes_per_step
    graphed, why_not = wants_graph(options.graph, comm, passes, train_set.home)
    optimizer = build_optimizer(
        model,
        torch.tensor(rate, device=comm.device) if graphed else rate,
        options.momentum,
        options.weight_decay,
        options.nesterov,
    )
    wrapped = model
    if not options.no_exchange:
        # From here on backward averages the gradients over the workers.
        exchange = Exchange(options.compression, passes, options.adasum)
        wrapped, optimizer = comm.wrap(model, optimizer, exchange)
    if saved:
        checkpoint.load_optimizer(optimizer, saved.state, saved.path)

    folder = run_folder(options)
    with comm.main_first():
        if comm.is_main:
            claim_folder(folder, options, saved)
            write_args(folder / "args.json", options, comm)
    about = {
        "arch": options.arch,
        "arch_arguments": {**model_arguments(options.arch), **model_arguments_of(options)},
        "dataset": options.dataset,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "memory_format": memory_format,
        "shape": shape,
        "options": vars(options),
    }
    saver = checkpoint.Saver(folder, comm, model, optimizer, about)
    log = RunLog(folder if comm.is_main else None, position.epoch, options.tensorboard)

    for line in start_lines(
        comm, options, model, data, len(train_set), batch, rate, memory_format, folder
    ):
        say(line)
    for line in warnings(options):
        say(f"warning: {line}")
    if train_set.home != comm.device:
        say("note: the images stay in main memory (--resident): no CUDA graph")
    if why_not:
        say(f"warning: --graph on: {why_not}; training without")
    for line in start_text(options, saved, position, comm.size):
        say(line)

    bounds = order.batches(len(train_set), batch, comm.size * passes)
    times = StepTimes(keep=options.trace is not None)
    step = Step(comm, wrapped, optimizer, options.amp, passes)
    meter = Meter(comm.device)
    graph = None
    if graphed:
        first, last = order.share(*bounds[0], comm.rank, comm.size)
        recorder = CudaRecorder(comm.device)
        graph = StepGraph(
            step, train_set, meter, last - first, bounds[0][1], comm.graph_warm_up, recorder, say
        )

    def after_step(done: int) -> None:
        """What happens inside an epoch, on every rank, after ``done`` steps of it."""
        if options.check_replicas and done % options.check_replicas == 0:
            check_replicas(comm, model)
        if options.save_every and done % options.save_every == 0 and done < len(bounds):
            position.step, position.sums = done, meter.collapse(comm)
            saver.save(position, is_best=False)

    while position.epoch < options.epochs:
        epoch = position.epoch
        started = time.perf_counter()
        rates = [schedule.learning_rate(epoch, k, len(bounds)) for k in range(len(bounds))]
        say(f"\nEpoch: [{epoch + 1} | {options.epochs}] LR: {rates[-1]:.6f}")
        train = train_one_epoch(
            step,
            graph,
            meter,
            train_set,
            bounds,
            rates,
            position,
            options.seed,
            comm,
            times,
            after_step,
        )
        train_seconds = time.perf_counter() - started
        if not math.isfinite(train.loss):
            raise TrainingError(
                f"the training loss is {train.loss} in epoch {epoch + 1} (learning rate "
                f"{rates[-1]:g}): nothing of this epoch is saved; lower --lr or add --warmup-steps"
            )
        if not options.no_exchange:
            check_replicas(comm, model)
        comm.average_buffers(model)  # one sum over the workers
        valid = evaluate_on(valid_set, model, comm, options)
        is_best = position.advance(valid.top1)
        say(
            f"train loss {train.loss:.4f} top1 {train.top1:.2f} | "
            f"valid loss {valid.loss:.4f} top1 {valid.top1:.2f} top5 {valid.top5:.2f} | "
            f"{time.perf_counter() - started:.1f} s, {train.images / train_seconds:,.0f} images/s"
        )
        log.epoch(epoch + 1, rates[-1], train, valid, train_seconds)
        saver.save(position, is_best)
        if comm.is_main:
            draw({folder.name: read_log(folder / "log.txt")}, folder / "log.png")
    log.close()
    times.write(Path(options.trace) if options.trace else None, comm)
    report_end(position, model, valid_set, test_set, folder, comm, options, say)


def _say_nothing(*_: object) -> None:
    """The print of the ranks other than 0."""


def train_one_epoch(
    step: Step,
    graph: StepGraph | None,
    meter: Meter,
    images: ImageSet,
    bounds: list[tuple[int, int]],
    rates: list[float],
    position: Position,
    seed_of_run: int,
    comm: Comm,
    times: StepTimes,
    after_step: Callable[[int], None],
) -> Metrics:
    """Train one epoch, or the rest of one, on this worker's share of each batch.

    Args:
        step: the optimisation step.
        graph: does the same for steps of its size, if given.
        meter: adds up loss and accuracy.
        images: the whole training set.
        bounds: the global batches as positions in the epoch's permutation.
        rates: the learning rate of each step.
        position: the epoch, the steps of it that are done, and the meter's sums over them.
        seed_of_run: of order, augmentation and dropout.
        comm: the engine.
        times: gets the seconds of each step.
        after_step: called with the number of steps done.

    Returns:
        Means over all images that all workers trained on.
    """
    step.model.train()
    epoch = position.epoch
    sequence = _to(order.permutation(len(images), seed_of_run, epoch), images.home)
    augmentation = _to(order.crops_and_flips(len(images), seed_of_run, epoch, PAD), images.home)
    meter.start_from(position.sums if comm.is_main else [0.0] * 4)
    bar = ProgressBar("train", len(bounds), comm.is_main)
    for k in range(position.step, len(bounds)):
        start, stop = bounds[k]
        first, last = order.share(start, stop, comm.rank, comm.size)
        index, seed = sequence[first:last], order.step_seed(seed_of_run, epoch, k)
        set_learning_rate(step.optimizer, rates[k])
        times.begin()
        if graph and graph.takes(len(index), stop - start):
            times.data_ready()
            loss = graph(index, augmentation, seed)
        else:
            batch, labels = images.batch(index, augmentation)
            times.data_ready()
            loss, output = step(batch, labels, stop - start, seed)  # all-reduces the gradients
            meter.update(loss, output, labels)
        times.step_done(loss, stop - start)
        if bar.due(k + 1):
            bar.show(k + 1, meter.local(), times)
        after_step(k + 1)
    bar.finish()
    return meter.reduced(comm)  # one sum over the workers


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    batch: int,
    amp: str,
    comm: Comm,
    confusion: Confusion | None = None,
) -> Metrics:
    """Score the model on a whole set, each worker a part of it.

    The batches are the same for any number of workers; worker r computes batches r, r + size, ...
    Nothing is padded or counted twice, and an image's logits do not depend on who computes them.
    Counts into confusion, if given.

    Raises:
        TrainingError: the workers have not counted every image exactly once.
    """
    model.eval()
    parts = torch.arange(len(images), device=images.home).split(batch)[comm.rank :: comm.size]
    meter = Meter(comm.device)
    times = StepTimes()
    bar = ProgressBar("valid", len(parts), comm.is_main)
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
    confusion: Confusion | None = None,
) -> Metrics:
    """``evaluate`` with the batch and precision of the options."""
    return evaluate(model, images, options.test_batch, options.amp, comm, confusion)


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
    comm.barrier()  # rank 0 has written the best checkpoint
    path = folder / checkpoint.BEST
    checkpoint.load_model(model, checkpoint.load(path), path, "the network of this run")
    best = evaluate_on(test_set, model, comm, options)
    say(f"\nLast acc: {last.top1:.2f} (epoch {position.epoch}, test set)")
    say(
        f"Best acc: {best.top1:.2f} (epoch {position.best_epoch}, test set; chosen by validation "
        f"accuracy {position.best_acc:.2f})"
    )
