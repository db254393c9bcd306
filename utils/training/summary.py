"""What a run says of itself at its start and at its end."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import model_arguments
from utils import log
from utils.checkpoint.format import BEST, LATEST, parse, read
from utils.checkpoint.history import is_best
from utils.checkpoint.restore import load_model
from utils.checkpoint.resume import LoadedCheckpoint
from utils.checkpoint.train_state import TrainState
from utils.config.schema import (
    WITHOUT_EFFECT,
    DataConfig,
    HardwareConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from utils.config.validation import warnings
from utils.data.datasets import Dataset
from utils.data.image_set import Splits
from utils.distributed.comm import Comm
from utils.errors import UserError, one_line
from utils.training.checkpoint_data import describe_scoring, log_read_as
from utils.training.evaluation import Evaluator
from utils.training.plan import EpochPlan


def log_start(
    architecture: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    hardware: HardwareConfig,
    *,
    model: nn.Module,
    dataset: Dataset,
    plan: EpochPlan,
    memory_format: str,
    folder: Path,
    comm: Comm,
) -> None:
    """Print the run summary, the block of lines that comes first, and what is odd about flags."""
    given = " ".join(f"{k}={v}" for k, v in architecture.arguments().items())
    parameters = sum(p.numel() for p in model.parameters())
    low, high = plan.global_batch // comm.world_size, -(-plan.global_batch // comm.world_size)
    shards = f"{low}" if low == high else f"{low} or {high}"
    lines = [
        f"model      {architecture.arch} {given}".rstrip() + f", {parameters:,} parameters",
        f"data       {data.dataset}: {plan.images:,} to train, "
        f"{len(dataset.test_labels):,} to test, {len(dataset.classes)} classes"
        + (f", {data.val_split:,} to validate" if data.val_split else ""),
        f"workers    {comm.world_size} ({comm.name}), each with {torch.get_num_threads()} CPU "
        "threads",
        f"device     {_device_name(comm.device)}, {hardware.dtype}, amp {hardware.amp}, "
        f"{memory_format}",
        f"batch      {plan.global_batch} images per step over all workers, {shards} per worker",
        f"rate       {plan.schedule.base:g} (--lr {train.lr:g}, scaling {train.lr_scaling}), "
        f"times {train.gamma:g} at {' '.join(map(str, train.schedule))}",
        f"seed       {train.seed}",
        f"folder     {folder}",
    ]
    if plan.dropped:
        lines.append(
            f"note       the last {plan.dropped} image(s) of an epoch are fewer than the workers: "
            "dropped"
        )
    if comm.device.type == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES"):
        lines.append(
            "warning    CUDA_VISIBLE_DEVICES names GPUs, none is usable: training on the CPU"
        )
    for line in lines:
        log.info(line)
    for line in warnings(train):
        log.warning(line)


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f"{device} {name}".rstrip()


def log_origin(
    loaded: LoadedCheckpoint | None,
    state: TrainState,
    about: Mapping[str, Any],
) -> None:
    """Print from what training starts, and what has changed since the checkpoint.

    Args:
        loaded: The checkpoint that the run goes on from, if any.
        state: How far it has come.
        about: What every checkpoint of the run says of it.
    """
    if loaded is None:
        log.info("starting from scratch")
        return
    text = f"continuing {loaded.path} after epoch {state.epoch}"
    if (trained := loaded.content.get("epoch", 0)) != state.epoch:
        text = f"continuing {loaded.path}, trained for {trained} epochs, as if after {state.epoch}"
    if state.step:
        text += f", step {state.step}"
    if not loaded.content.get("optimizer"):
        text += " (it has no optimizer state: momentum starts at zero)"
    log.info(text)
    log_read_as(loaded)
    for change in _changes(loaded.content, about):
        log.note(one_line(change, most=1000))


def _changes(before: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """Return in words what is otherwise than the start that has written a checkpoint says."""
    options, workers, found = about["options"], about["workers"], []
    if before.get("workers", workers) != workers:
        what = "the order of the images stays, the global batch is another (--batch-per-worker)"
        if options["batch_per_worker"] is None:
            what = "the global batch and the order of the images stay"
        if not options["sync_bn"]:
            what += "; batch norm, where there is any, sees other shares"
        found.append(f"{before['workers']} worker(s) have trained so far, now {workers}: {what}")
    images = before.get("images")
    if not isinstance(images, list):  # A file of an older version does not tell.
        images = about["images"]
    if images[:2] != about["images"][:2]:
        found.append(
            "these are other images than so far, or the same in another order: from here on other "
            "batches are drawn"
        )
    if images[2:] != about["images"][2:]:
        found.append("the test images are others than so far, or the same in another order")
    options_before = before.get("options")
    if isinstance(options_before, dict) and (changed := _changed(options_before, options)):
        found.append(f"changed since the checkpoint: {', '.join(changed)}")
    return found


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words which options have another value than before and make another training."""
    own, found = model_arguments(now["arch"]), []
    for name, old in before.items():
        if name not in now or name in WITHOUT_EFFECT or name == "start_epoch":
            continue  # Where training starts is said by itself.
        # Unset, a flag of the model is the model's default.
        values = [own.get(name) if value is None else value for value in (old, now[name])]
        if values[0] != values[1]:
            words = ["not given" if value is None else str(value) for value in (old, now[name])]
            found.append(f"--{name.replace('_', '-')} {' -> '.join(words)}")
    return found


def log_finished(
    loaded: LoadedCheckpoint, options: Mapping[str, Any], dataset: Dataset, splits: Splits
) -> None:
    """Print that a run has nothing left to train, with its accuracies.

    Args:
        loaded: The checkpoint that would be continued.
        options: The options of the present start.
        dataset: The data set, with the statistics and classes of the checkpoint.
        splits: The sets.
    """
    content = loaded.content
    split = "test" if splits.validation is splits.test else "validation"
    last, best = (
        f"{content[key]:.2f}" if key in content else "not known" for key in ("acc", "best_acc")
    )
    where = f"on the {describe_scoring(dataset, len(splits.validation), split)}"
    if "images" not in content:
        where = "as the file says, on images that it does not name"
    log.info(
        f"finished: {loaded.path} has been trained for {content['epoch']} epochs; "
        f"Last acc: {last}, Best acc: {best} ({_epoch_of(content.get('best_epoch', 0))}), {where}"
    )
    before = content.get("options")
    if isinstance(before, dict) and (changed := _changed(before, options)):
        log.note(one_line(f"other flags than its own have no effect: {', '.join(changed)}"))


def _epoch_of(number: int) -> str:
    return f"epoch {number}" if number else "epoch not known"


def log_end(
    state: TrainState,
    evaluator: Evaluator,
    splits: Splits,
    dataset: Dataset,
    folder: Path,
    run: RunConfig,
) -> None:
    """Print last and best accuracy, each by its name; every rank must call this.

    With --val-split the two epochs were chosen on held-out images. The test set is used here for
    the first time.

    Args:
        state: Where the run has ended.
        evaluator: Scores the network, which gets the weights of the best epoch.
        splits: The sets.
        dataset: The data set that they are of.
        folder: The run folder.
        run: Says whether files may be trusted, which the best one may need.
    """
    path, comm, trust = folder / BEST, evaluator.comm, run.trust_checkpoint
    last, best, chosen = state.acc, f"{state.best_acc:.2f}", "chosen on the test set"
    if not state.best_epoch:
        chosen = "as an older script says, on images that it does not name"
    content = _read_best(path, state, trust) if comm.is_main_process else b""
    if splits.validation is not splits.test:
        last, best = evaluator(splits.test).top1, "not known"
        chosen = f"test set; chosen by validation accuracy {state.best_acc:.2f}"
        if not state.best_epoch:
            chosen += ", as an older script says"
        if weights := comm.broadcast_bytes(lambda: content):
            checkpoint = parse(weights, path, "", trust)
            load_model(evaluator.model, checkpoint, path, "the network of this run")
            best = f"{evaluator(splits.test).top1:.2f}"
    if not content:
        chosen += f"; its weights are not in {folder}"
    log.info(f"\nLast acc: {last:.2f} (epoch {state.epoch}, test set)")
    log.info(f"Best acc: {best} ({_epoch_of(state.best_epoch)}, {chosen})")
    files = f"{folder / LATEST}{f' and {BEST}' if content else ''}"
    log.info(f"of {files}, on the {describe_scoring(dataset, len(splits.test), 'test')}")


def _read_best(path: Path, state: TrainState, trust: bool) -> bytes:
    """Return the file with the weights of the best epoch; nothing where they are not in it."""
    try:
        content = read(path)
        return content if is_best(parse(content, path, "", trust), state) else b""
    except UserError:
        return b""
