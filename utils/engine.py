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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from models import ModelError, create_model, model_arguments
from utils import checkpoint, order
from utils.augment import ImageSet
from utils.comm import Comm, Exchange
from utils.data import Dataset, load_dataset
from utils.errors import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    PeerFailed,
    TrainingError,
    UserError,
)
from utils.files import check_writable, clear_leftovers
from utils.logger import ProgressBar, RunLog, check_tensorboard
from utils.metrics import Meter, Metrics
from utils.optim import Schedule, build_optimizer, scaled_rate, set_learning_rate
from utils.options import MODEL_FLAGS, model_arguments_of, parse_args, warnings
from utils.plot import draw, read_log
from utils.precision import at_least_float32, autocast, cpu_runs_bf16
from utils.provenance import versions, write_args
from utils.recipes import run_name
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


def select_gpus(ids: str | None) -> None:
    """Let CUDA see the GPUs of --gpu-id only; call before CUDA is initialised.

    Raises:
        UserError: malformed ids, or no such GPU.
    """
    if ids is None:
        return
    wanted = ids.split(",")
    if not all(number.isdecimal() for number in wanted) or len(set(wanted)) < len(wanted):
        raise UserError(f"--gpu-id {ids!r}: give ids such as 0 or 0,1, each once")
    os.environ["CUDA_VISIBLE_DEVICES"] = ids
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < len(wanted):
        raise UserError(
            f"--gpu-id {ids}: the machine has not all of these GPUs; "
            "name ids it has, or leave the flag out (without any GPU the CPU trains)"
        )


def run(comm: Comm, options: argparse.Namespace) -> None:
    """Train, or evaluate a checkpoint, as the options say."""
    say = print if comm.is_main else _say_nothing
    make_reproducible(options.seed, options.deterministic)
    if options.tensorboard:
        check_tensorboard()
    options.amp = usable_precision(comm, options.amp, say)
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
    train_set, valid_set, test_set = build_sets(data, options, comm.device)
    batch = global_batch(options, comm.size, len(train_set))

    model = build_model(options, len(data.classes)).to(comm.device, train_set.scale.dtype)
    if options.sync_bn:
        convert_sync_batchnorm(model, comm)
    if saved:
        wanted = checkpoint.describe_model(
            options.arch, model_arguments_of(options) | {"num_classes": len(data.classes)}
        )
        checkpoint.load_model(model, saved.state, saved.path, wanted)

    if options.evaluate:
        report_evaluation(evaluate_on(test_set, model, comm, options), saved, say)
        return

    rate = scaled_rate(options.lr, batch, options.lr_scaling)
    schedule = Schedule(rate, options.schedule, options.gamma, options.warmup_steps, options.warmup)
    optimizer = build_optimizer(
        model, rate, options.momentum, options.weight_decay, options.nesterov
    )
    passes = options.backward_passes_per_step
    exchange = Exchange(options.compression, passes, options.adasum)
    wrapped = model
    if not options.no_exchange:
        # From here on backward averages the gradients over the workers.
        wrapped, optimizer = comm.wrap(model, optimizer, exchange)
    position = start_position(options, saved, optimizer)
    folder = run_folder(options)
    with comm.main_first():
        if comm.is_main:
            claim_folder(folder, options, saved)
            write_args(folder / "args.json", options, comm)
    log = RunLog(folder if comm.is_main else None, position.epoch, options.tensorboard)

    for line in start_lines(comm, options, model, data, len(train_set), batch, rate, folder):
        say(line)
    for line in warnings(options):
        say(f"warning: {line}")
    say(position.text)

    times = StepTimes(keep=options.trace is not None)
    step = Step(comm, wrapped, optimizer, options.amp, passes)
    while position.epoch < options.epochs:
        epoch = position.epoch
        started = time.perf_counter()
        bounds = order.batches(len(train_set), batch, comm.size * passes)
        rates = [schedule.learning_rate(epoch, k, len(bounds)) for k in range(len(bounds))]
        say(f"\nEpoch: [{epoch + 1} | {options.epochs}] LR: {rates[-1]:.6f}")
        model.train()
        train = train_one_epoch(step, train_set, bounds, rates, epoch, options, comm, times)
        train_seconds = time.perf_counter() - started
        if not math.isfinite(train.loss):
            raise TrainingError(
                f"the training loss is {train.loss} in epoch {epoch + 1} (learning rate "
                f"{rates[-1]:g}): nothing of this epoch is saved; lower --lr or add --warmup-steps"
            )
        comm.average_buffers(model)  # one sum over the workers
        valid = evaluate_on(valid_set, model, comm, options)
        position.advance(valid.top1)
        say(
            f"train loss {train.loss:.4f} top1 {train.top1:.2f} | "
            f"valid loss {valid.loss:.4f} top1 {valid.top1:.2f} top5 {valid.top5:.2f} | "
            f"{time.perf_counter() - started:.1f} s, {train.images / train_seconds:,.0f} images/s"
        )
        log.epoch(epoch + 1, rates[-1], train, valid, train_seconds)
        if comm.is_main:
            state = checkpoint_state(model, optimizer, options, data, position, valid, comm)
            checkpoint.save(folder, state, is_best=position.best_epoch == epoch + 1)
            draw({folder.name: read_log(folder / "log.txt")}, folder / "log.png")
    log.close()
    times.write(Path(options.trace) if options.trace else None, comm)
    report_end(position, model, valid_set, test_set, folder, comm, options, say)


def _say_nothing(*_: object) -> None:
    """The print of the ranks other than 0."""


def make_reproducible(seed: int, deterministic: bool) -> None:
    """Seed what draws initial weights; optionally forbid algorithms that vary from run to run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic


def usable_precision(comm: Comm, amp: str, say: Any) -> str:
    """The precision to use: "off" where bf16 is asked for and a CPU cannot run it."""
    if amp == "off" or comm.device.type != "cpu":
        return amp
    works = torch.tensor(float(comm.is_main and cpu_runs_bf16()))
    if comm.broadcast_(works).item():  # rank 0 has tried
        return amp
    say("warning: --amp bf16: bf16 convolutions do not run on this processor; training in fp32")
    return "off"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been read."""

    path: Path
    state: dict[str, Any]


def find_checkpoint(options: argparse.Namespace) -> Saved | None:
    """The checkpoint that --resume names, read; None without --resume or for a fresh auto run."""
    if not options.resume:
        return None
    path = Path(options.resume)
    if options.resume == "auto":
        path = run_folder(options) / checkpoint.LATEST
        if not path.exists():
            if options.evaluate:
                raise UserError(f"--resume auto: {path} does not exist; name a file to evaluate")
            return None
    return Saved(path, checkpoint.load(path))


def run_folder(options: argparse.Namespace) -> Path:
    """Where the run's files go: --checkpoint, the folder of --resume FILE, or a derived name."""
    if options.checkpoint:
        return Path(options.checkpoint)
    if options.resume and options.resume != "auto":
        return Path(options.resume).parent
    name = run_name(options.arch, model_arguments_of(options))
    return Path("checkpoints") / options.dataset / name


def build_model(options: argparse.Namespace, classes: int) -> nn.Module:
    """The raw network of the model flags.

    Raises:
        UserError: a flag that the model does not take, or a value that it cannot have.
    """
    try:
        return create_model(options.arch, num_classes=classes, **model_arguments_of(options))
    except ModelError as error:
        flag = MODEL_FLAGS.get(error.argument, f"--{error.argument}")
        raise UserError(f"-a {options.arch} {flag} {error.value}: {error.why}") from error


def build_sets(
    data: Dataset, options: argparse.Namespace, device: torch.device
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, validation and test set; without --val-split the test set validates."""
    dtype = {"float32": torch.float32, "float64": torch.float64}[options.dtype]
    pad = 4

    def images(index: np.ndarray | slice, train: bool, augmented: bool) -> ImageSet:
        return ImageSet(
            (data.train_images if train else data.test_images)[index],
            (data.train_labels if train else data.test_labels)[index],
            data.mean,
            data.std,
            device=device,
            dtype=dtype,
            pad=pad if augmented else 0,
            pad_mode=options.pad_mode,
        )

    test_set = images(slice(None), train=False, augmented=False)
    if not options.val_split:
        return images(slice(None), train=True, augmented=True), test_set, test_set
    count = len(data.train_labels)
    if options.val_split >= count:
        raise UserError(
            f"--val-split {options.val_split}: the training set has {count} images; hold out fewer"
        )
    kept, held_out = order.split(count, options.val_split)
    return (
        images(kept, train=True, augmented=True),
        images(held_out, train=True, augmented=False),
        test_set,
    )


def global_batch(options: argparse.Namespace, workers: int, images: int) -> int:
    """Images per step over all workers.

    Raises:
        UserError: fewer images in a batch, or in the whole set, than workers.
    """
    batch = options.train_batch
    if options.batch_per_worker:
        batch = options.batch_per_worker * workers
    needed = workers * options.backward_passes_per_step
    if batch < needed:
        raise UserError(
            f"--train-batch {batch}: smaller than {needed}, the {workers} workers times "
            f"--backward-passes-per-step {options.backward_passes_per_step}; each pass needs an "
            "image, so give a larger batch or start fewer workers"
        )
    if images < needed:
        raise UserError(
            f"--train-size {images}: {needed} images are the least for {workers} workers times "
            f"--backward-passes-per-step {options.backward_passes_per_step}; give more images"
        )
    return batch


@dataclass
class Position:
    """How far training has come.

    Attributes:
        epoch: the next epoch, counted from 0.
        acc: the last validation accuracy, per cent.
        best_acc, best_epoch: the highest so far and its epoch, counted from 1.
        text: how the run began, in words.
    """

    epoch: int = 0
    acc: float = 0.0
    best_acc: float = 0.0
    best_epoch: int = 0
    text: str = "starting from scratch"

    def advance(self, acc: float) -> None:
        """Count the epoch that has just been validated."""
        self.epoch += 1
        self.acc = acc
        if self.best_epoch == 0 or acc > self.best_acc:
            self.best_acc, self.best_epoch = acc, self.epoch


def start_position(
    options: argparse.Namespace, saved: Saved | None, optimizer: Optimizer
) -> Position:
    """Where training starts; restores the optimizer from the checkpoint.

    Raises:
        UserError: the checkpoint is damaged or has no epochs left to train.
    """
    position = Position()
    if saved:
        restored = checkpoint.load_optimizer(optimizer, saved.state, saved.path)
        state = saved.state
        position = Position(
            epoch=int(state.get("epoch", 0)),
            acc=float(state.get("acc", 0.0)),
            best_acc=float(state.get("best_acc", 0.0)),
            best_epoch=int(state.get("best_epoch", state.get("epoch", 0))),
        )
        position.text = f"continuing {saved.path} after epoch {position.epoch}"
        if not restored:
            position.text += " (it has no optimizer state: momentum starts at zero)"
    if options.start_epoch is not None:
        position.epoch = options.start_epoch
        position.text += f", from epoch {position.epoch + 1} by --start-epoch"
    if saved and position.epoch >= options.epochs:
        raise UserError(
            f"--resume {saved.path}: has been trained for {position.epoch} epochs and --epochs is "
            f"{options.epochs}; give more --epochs, or --evaluate"
        )
    return position


def claim_folder(folder: Path, options: argparse.Namespace, saved: Saved | None) -> None:
    """Make the run folder, or see that an existing one may be written to.

    Raises:
        UserError: it holds another run, or cannot be written to.
    """
    names = (checkpoint.LATEST, checkpoint.BEST, "log.txt", "metrics.jsonl", "log.png")
    mine = saved is not None and saved.path.resolve().parent == folder.resolve()
    try:
        found = [name for name in names if (folder / name).exists()]
        if found and not mine and not options.overwrite:
            raise UserError(
                f"--checkpoint {folder}: holds a run already ({found[0]}); "
                "--resume auto continues it, --overwrite replaces it, -c DIR names another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
        clear_leftovers(folder)
        for name in [] if mine else found:
            (folder / name).unlink()
    except OSError as error:
        raise UserError(
            f"--checkpoint {folder}: cannot be written to ({error.strerror}); "
            "name another folder with -c DIR"
        ) from error


def start_lines(
    comm: Comm,
    options: argparse.Namespace,
    model: nn.Module,
    data: Dataset,
    images: int,
    batch: int,
    rate: float,
    folder: Path,
) -> list[str]:
    """The block that a run prints first."""
    given = " ".join(f"{k}={v}" for k, v in model_arguments_of(options).items())
    parameters = sum(p.numel() for p in model.parameters())
    low, high = batch // comm.size, -(-batch // comm.size)
    shares = f"{low}" if low == high else f"{low} or {high}"
    device = str(comm.device)
    if comm.device.type == "cuda":
        device = f"{comm.device} {torch.cuda.get_device_name(comm.device)}"
    lines = [
        f"model      {options.arch} {given}".rstrip() + f", {parameters:,} parameters",
        f"data       {options.dataset}: {images:,} to train, {len(data.test_labels):,} to test, "
        f"{len(data.classes)} classes"
        + (f", {options.val_split:,} to validate" if options.val_split else ""),
        f"workers    {comm.size} ({comm.name}), each with {torch.get_num_threads()} CPU threads",
        f"device     {device}, {options.dtype}, amp {options.amp}",
        f"batch      {batch} images per step over all workers, {shares} per worker",
        f"rate       {rate:g} (--lr {options.lr:g}, scaling {options.lr_scaling}), "
        f"times {options.gamma:g} at {' '.join(map(str, options.schedule))}",
        f"seed       {options.seed}",
        f"folder     {folder}",
    ]
    tail = images % batch
    if 0 < tail < comm.size * options.backward_passes_per_step:
        lines.append(f"note       the last {tail} image(s) of an epoch are fewer than the workers: "
                     "dropped")  # fmt: skip
    if comm.device.type == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES"):
        lines.append("warning    CUDA_VISIBLE_DEVICES names GPUs, none is usable: training on the "
                     "CPU")  # fmt: skip
    return lines


def train_one_epoch(
    step: Step,
    images: ImageSet,
    bounds: list[tuple[int, int]],
    rates: list[float],
    epoch: int,
    options: argparse.Namespace,
    comm: Comm,
    times: StepTimes,
) -> Metrics:
    """Train one epoch on this worker's share of each batch.

    Args:
        step: the optimisation step.
        images: the whole training set.
        bounds: the global batches as positions in the epoch's permutation.
        rates: the learning rate of each step.
        epoch: counted from 0.
        options: for seed and display.
        comm: the engine.
        times: gets the seconds of each step.

    Returns:
        Means over all images that all workers trained on.
    """
    sequence = _to(order.permutation(len(images), options.seed, epoch), comm.device)
    augmentation = _to(order.crops_and_flips(len(images), options.seed, epoch, 4), comm.device)
    meter = Meter(comm.device)
    bar = ProgressBar("train", len(bounds), comm.is_main)
    for k, ((start, stop), rate) in enumerate(zip(bounds, rates, strict=True)):
        first, last = order.share(start, stop, comm.rank, comm.size)
        times.begin()
        batch, labels = images.batch(sequence[first:last], augmentation)
        times.data_ready()
        torch.manual_seed(order.step_seed(options.seed, epoch, k, comm.rank))
        set_learning_rate(step.optimizer, rate)
        loss, output = step(batch, labels, stop - start)  # all-reduces the gradients
        meter.update(loss, output, labels)
        times.step_done(loss, stop - start)
        if bar.due(k + 1):
            bar.show(k + 1, meter.local(), times)
    bar.finish()
    return meter.reduced(comm)  # one sum over the workers


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


@torch.inference_mode()
def evaluate(model: nn.Module, images: ImageSet, batch: int, amp: str, comm: Comm) -> Metrics:
    """Score the model on a whole set, each worker a part of it.

    Worker r takes images r, r + size, ...: nothing is padded or counted twice, so the result
    belongs to the set and not to the number of workers.

    Raises:
        TrainingError: the workers have not counted every image exactly once.
    """
    model.eval()
    mine = torch.arange(comm.rank, len(images), comm.size, device=comm.device)
    parts = mine.split(batch)
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
        times.step_done(loss, len(index))
        if bar.due(k + 1):
            bar.show(k + 1, meter.local(), times)
    bar.finish()
    result = meter.reduced(comm)  # one sum over the workers
    if result.images != len(images):
        raise TrainingError(f"evaluated {result.images} images of {len(images)}")
    return result


def evaluate_on(
    images: ImageSet, model: nn.Module, comm: Comm, options: argparse.Namespace
) -> Metrics:
    """``evaluate`` with the batch and precision of the options."""
    return evaluate(model, images, options.test_batch, options.amp, comm)


def report_evaluation(result: Metrics, saved: Saved | None, say: Any) -> None:
    """Print what --evaluate has found."""
    if saved:
        say(f"{saved.path}, after epoch {saved.state.get('epoch', 'unknown')}")
    say(
        f"Test Loss: {result.loss:.8f}, Test Acc: {result.top1:.2f} "
        f"({round(result.top1 * result.images / 100)} of {result.images}), top5 {result.top5:.2f}"
    )


def checkpoint_state(
    model: nn.Module,
    optimizer: Optimizer,
    options: argparse.Namespace,
    data: Dataset,
    position: Position,
    valid: Metrics,
    comm: Comm,
) -> dict[str, Any]:
    """What a checkpoint holds; see utils/checkpoint.py for the promises about it."""
    return {
        "format": checkpoint.FORMAT,
        "epoch": position.epoch,
        "step": 0,
        "arch": options.arch,
        "arch_arguments": {**model_arguments(options.arch), **model_arguments_of(options)},
        "dataset": options.dataset,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "state_dict": model.state_dict(),
        "acc": valid.top1,
        "best_acc": position.best_acc,
        "best_epoch": position.best_epoch,
        "optimizer": optimizer.state_dict(),
        "options": vars(options),
        "workers": comm.size,
        "versions": versions(),
    }


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
