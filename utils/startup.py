"""What happens before the first step: devices, data, network, checkpoint, run folder.

Everything here raises UserError on bad input, and writes nothing before all of it is checked.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from models import ModelError, create_model
from utils.checkpoint import format as checkpoint
from utils.checkpoint.train_state import Position
from utils.config.args import MODEL_FLAGS, model_arguments_of, of_the_run
from utils.config.recipes import run_name
from utils.data import sampling as order
from utils.data.datasets import Dataset
from utils.data.image_set import ImageSet, keep_on_device
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.files import (
    FolderInUse,
    check_writable,
    clear_leftovers,
    lock_folder,
    unlock_folder,
)
from utils.runtime.estimate import in_bytes, node_memory
from utils.runtime.memory_format import FORMATS, choose
from utils.runtime.precision import cpu_runs_bf16

PAD = 4  # pixels that a random crop may reach beyond the image, as in all published recipes


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


def make_reproducible(seed: int, deterministic: bool) -> None:
    """Seed what draws initial weights; optionally forbid algorithms that vary from run to run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic


def choose_tf32(choice: str | None) -> None:
    """Let GPUs round fp32 products to TF32, or not; None leaves PyTorch's own choice."""
    if choice:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = choice == "on"


def compile_blocks(model: nn.Module) -> None:
    """Let torch.compile fuse each block of a deep network, or the whole of a shallow one.

    Blocks of a kind are compiled once, so that depth costs little. Names in checkpoints stay.
    """
    rows = [m for m in model.modules() if isinstance(m, nn.Sequential)]
    blocks = [block for row in rows for block in row if list(block.children())]
    for block in blocks or [model]:
        block.compile()


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


def find_checkpoint(
    options: argparse.Namespace, comm: Comm, say: Callable[[str], Any]
) -> Saved | None:
    """The checkpoint to continue from; None without --resume or for a fresh auto run.

    Rank 0 finds and reads it and the others get the same bytes: no two workers can see different
    files. A job that has been started again after a failure goes on from what it has saved.
    """
    chosen: list[Saved] = []

    def choose() -> bytes:
        found = _own_checkpoint(options, say) if comm.restarts() else None
        found = found or _wanted_checkpoint(options, say)
        if found is None:
            return b""
        path, content, state = found
        chosen.append(Saved(path, state))
        return os.fsencode(path) + b"\0" + content

    name, _, content = comm.from_main(choose).partition(b"\0")
    if not name:
        return None
    if chosen:
        return chosen[0]
    path = Path(os.fsdecode(name))
    return Saved(path, checkpoint.parse(content, path, "--resume", options.trust_checkpoint))


Found = tuple[Path, bytes, dict[str, Any]]


def _wanted_checkpoint(options: argparse.Namespace, say: Callable[[str], Any]) -> Found | None:
    """What --resume names."""
    if not options.resume:
        return None
    folder = run_folder(options)
    if options.resume == "auto":
        found = checkpoint.load_newest(folder, say, options.trust_checkpoint)
        if found is None and options.evaluate:
            path = folder / checkpoint.LATEST
            raise UserError(f"--resume auto: {path} does not exist; name a file to evaluate")
        return found
    path = Path(options.resume)
    content = checkpoint.read(path)
    return path, content, checkpoint.parse(content, path, "--resume", options.trust_checkpoint)


def _own_checkpoint(options: argparse.Namespace, say: Callable[[str], Any]) -> Found | None:
    """What this very job has saved before it failed: a run with the same options."""
    found = checkpoint.load_newest(run_folder(options), say, options.trust_checkpoint)
    return found if found and _same_options(found[2].get("options"), options) else None


def _same_options(recorded: Any, options: argparse.Namespace) -> bool:
    return isinstance(recorded, dict) and of_the_run(recorded) == of_the_run(vars(options))


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


def check_fits(network: nn.Module, options: argparse.Namespace, comm: Comm) -> None:
    """Refuse a network that the machine cannot hold; on the meta device it takes no memory yet.

    Raises:
        UserError: the parameters, for training with gradients and momentum, need more.
    """
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    needed = weights * (1 if options.evaluate else 3) * comm.local_size
    has = node_memory(comm)
    if needed > has:
        flags = {MODEL_FLAGS[name]: value for name, value in model_arguments_of(options).items()}
        given = " ".join(f"{flag} {value}" for flag, value in flags.items())
        raise UserError(
            f"-a {options.arch} {given}: the network alone needs {in_bytes(needed)} on this node, "
            f"which has {in_bytes(has)}; choose a smaller one or fewer workers"
        )


def memory_format_for(
    model: nn.Module, options: argparse.Namespace, saved: Saved | None, images: int, comm: Comm
) -> str:
    """The memory format to use: that of --memory-format, of the checkpoint, or the faster one."""
    if options.memory_format != "auto":
        return options.memory_format
    if saved and saved.state.get("memory_format") in FORMATS:
        return saved.state["memory_format"]  # the same rounding as before the interruption
    if options.evaluate or options.deterministic:
        return "contiguous"
    name = run_name(options.arch, model_arguments_of(options))
    return choose(name, model, images * options.epochs, options.amp, comm)


def build_sets(
    data: Dataset, options: argparse.Namespace, comm: Comm
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, validation and test set; without --val-split the test set validates."""
    dtype = {"float32": torch.float32, "float64": torch.float64}[options.dtype]
    count, height, width, channels = data.train_images.shape
    padded = count * (height + 2 * PAD) * (width + 2 * PAD) * channels
    resident = keep_on_device(options.resident, padded + data.test_images.nbytes, comm)

    def images(index: np.ndarray | slice, train: bool, augmented: bool) -> ImageSet:
        return ImageSet(
            (data.train_images if train else data.test_images)[index],
            (data.train_labels if train else data.test_labels)[index],
            data.mean,
            data.std,
            device=comm.device,
            resident=resident,
            dtype=dtype,
            pad=PAD if augmented else 0,
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


def start_position(
    options: argparse.Namespace, saved: Saved | None, shape: dict[str, Any]
) -> Position:
    """Where training starts.

    Args:
        options: of the command line.
        saved: the checkpoint to continue, if any.
        shape: what the meaning of a step depends on; see ``epoch_shape``.

    Raises:
        UserError: the checkpoint has no epochs left to train, or stands inside an epoch of
            another shape.
    """
    if saved is None:
        return Position(epoch=options.start_epoch or 0)
    state = saved.state
    try:
        position = Position(
            epoch=int(state.get("epoch", 0)),
            step=int(state.get("step", 0)),
            sums=_rows_of(state.get("step_sums", [])),
            acc=float(state.get("acc", 0.0)),
            best_acc=float(state.get("best_acc", 0.0)),
            best_epoch=int(state.get("best_epoch", state.get("epoch", 0))),
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--resume {saved.path}: does not say how far it has been trained ({error}); "
            "give another file"
        ) from error
    if options.start_epoch is not None:
        position.epoch, position.step, position.sums = options.start_epoch, 0, []
    if position.epoch >= options.epochs:
        raise UserError(
            f"--resume {saved.path}: has been trained for {position.epoch} epochs and --epochs is "
            f"{options.epochs}; give more --epochs, or --evaluate"
        )
    for name, value in state.get("shape", {}).items() if position.step else ():
        if shape.get(name) != value:
            raise UserError(
                f"--resume {saved.path}: stands at step {position.step} of an epoch with {name} "
                f"{value}, not {shape.get(name)}; finish that epoch with the old flags first"
            )
    return position


def _rows_of(sums: list[Any]) -> list[list[float]]:
    """The sums of each worker; files of format 1 hold one row of them all."""
    if sums and not isinstance(sums[0], list):
        return [list(sums)]
    return [list(row) for row in sums]


def epoch_shape(options: argparse.Namespace, batch: int, images: int) -> dict[str, Any]:
    """What decides which images the steps of an epoch train on; the number of workers does not."""
    return {
        "global batch": batch,
        "training images": images,
        "seed": options.seed,
        "dataset": options.dataset,
    }


def start_text(
    options: argparse.Namespace, saved: Saved | None, position: Position, workers: int
) -> list[str]:
    """How the run begins, in words."""
    if saved is None:
        return ["starting from scratch"]
    text = f"continuing {saved.path} after epoch {position.epoch}"
    if position.step:
        text += f", step {position.step}"
    if not saved.state.get("optimizer"):
        text += " (it has no optimizer state: momentum starts at zero)"
    lines = [text]
    before = saved.state.get("workers", workers)
    if before != workers:
        lines.append(
            f"note: {before} worker(s) have trained so far, now {workers}: the global batch and "
            "the order of the images stay"
            + ("" if options.sync_bn else "; batch norm, where there is any, sees other shares")
        )
    changed = [
        f"--{name.replace('_', '-')} {old} -> {vars(options)[name]}"
        for name, old in saved.state.get("options", {}).items()
        if name in OPTIONS_THAT_MATTER and vars(options).get(name) != old
    ]
    if changed:
        lines.append(f"note: changed since the checkpoint: {', '.join(changed)}")
    return lines


# Those whose change makes another training.
OPTIONS_THAT_MATTER = (
    "dataset", "train_size", "val_split", "stats", "pad_mode", "epochs", "train_batch",
    "batch_per_worker", "lr", "lr_scaling", "schedule", "gamma", "warmup_steps", "warmup",
    "momentum", "nesterov", "weight_decay", "sync_bn", "seed", "compression", "amp", "dtype",
    "drop",
)  # fmt: skip


def claim_folder(
    folder: Path, options: argparse.Namespace, saved: Saved | None, restarted: bool
) -> IO[str]:
    """Make the run folder and claim it for this process, or see that an existing one may be had.

    Returns:
        The lock on the folder; it holds until the process ends.

    Raises:
        UserError: it holds another run, a run that is under way, or cannot be written to.
    """
    names = (
        checkpoint.LATEST, checkpoint.PREVIOUS, checkpoint.DAMAGED, checkpoint.BEST,
        "log.txt", "metrics.jsonl", "log.png",
    )  # fmt: skip
    mine = saved is not None and saved.path.resolve().parent == folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
        if options.trace:
            check_trace(Path(options.trace))
        lock = lock_folder(folder)
        found = [name for name in names if (folder / name).exists()]
        begun = saved is None and (
            # Killed before it saved anything: a log without rows is all that there is.
            (options.resume == "auto" and _has_no_rows(folder, found))
            or (restarted and _begun_with(folder, options))
        )
        if found and not mine and not begun and not options.overwrite:
            unlock_folder(lock)
            raise UserError(
                f"--checkpoint {folder}: holds a run already ({found[0]}); "
                "--resume auto continues it, --overwrite replaces it, -c DIR names another folder"
            )
        clear_leftovers(folder)
        for name in [] if mine else found:
            (folder / name).unlink()
        if mine and saved and saved.path.name == checkpoint.PREVIOUS:
            checkpoint.restore_newest(folder)
    except FolderInUse as error:
        raise UserError(
            f"--checkpoint {folder}: {error} is training there; wait for its end, or name another "
            "folder with -c DIR"
        ) from error
    except OSError as error:
        raise UserError(
            f"--checkpoint {folder}: cannot be written to ({error.strerror}); "
            "name another folder with -c DIR"
        ) from error
    return lock


def check_trace(path: Path) -> None:
    """Raise UserError where --trace could not be written at the end of the run."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        check_writable(path.parent)
    except OSError as error:
        raise UserError(
            f"--trace {path}: cannot be written ({error.strerror}); name another file"
        ) from error


def _begun_with(folder: Path, options: argparse.Namespace) -> bool:
    """Whether the run in a folder was started with these options, as its args.json says."""
    try:
        return _same_options(json.loads((folder / "args.json").read_text())["options"], options)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_no_rows(folder: Path, found: list[str]) -> bool:
    """Whether what was found in a run folder is a log that has a head at most."""
    lines = {"log.txt": 1, "metrics.jsonl": 0}
    return all(
        name in lines and len((folder / name).read_text().splitlines()) <= lines[name]
        for name in found
    )


def start_lines(
    comm: Comm,
    options: argparse.Namespace,
    model: nn.Module,
    data: Dataset,
    images: int,
    batch: int,
    rate: float,
    memory_format: str,
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
        f"device     {device}, {options.dtype}, amp {options.amp}, {memory_format}",
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
