"""Putting a run together: network, sets, optimizer, step and loop, here and nowhere else.

cifar.py calls this in the order that it needs; bench/ and tools/ take from it what they measure.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import ModelError, create_model, model_arguments
from utils import log
from utils.checkpoint import run_dir
from utils.checkpoint.format import describe_model
from utils.checkpoint.restore import load_model
from utils.checkpoint.resume import LoadedCheckpoint, earlier_starts
from utils.config.schema import MODEL_FLAGS, Config, DataConfig, ModelConfig
from utils.data import sampling
from utils.data.datasets import Dataset, load_dataset
from utils.data.image_set import ImageSet, Splits, fits_on_device
from utils.distributed.comm import Comm
from utils.distributed.sync_batchnorm import convert_sync_batchnorm
from utils.errors import UserError
from utils.runtime import provenance
from utils.runtime.estimate import format_bytes, node_memory
from utils.runtime.malloc import retain_freed_memory
from utils.runtime.memory_format import FORMATS, apply_memory_format, choose_memory_format
from utils.training.cuda_graph import RECORDERS, Recorder, resolve_cuda_graph
from utils.training.evaluation import Evaluator
from utils.training.loop import TrainLoop
from utils.training.optim import build_optimizer
from utils.training.plan import EpochPlan
from utils.training.step import Step

# The arguments of models that the names and shapes of tensors do not show.
_NO_SHAPE = frozenset({"drop", "checkpoint_activations"})


def network(architecture: ModelConfig, classes: int) -> nn.Module:
    """Return the raw network of the model flags, freshly initialised.

    Raises:
        UserError: There is no such model, or a flag is one that it does not take or cannot have.
    """
    try:
        return create_model(architecture.arch, num_classes=classes, **architecture.arguments())
    except ModelError as error:
        if error.argument == "arch":
            raise UserError(f"-a {architecture.arch!r}: {error.why}") from error
        flag = MODEL_FLAGS.get(error.argument, f"--{error.argument}")
        raise UserError(f"-a {architecture.arch} {flag} {error.value}: {error.why}") from error


def check_model_fits(config: Config, comm: Comm) -> None:
    """Refuse a network that the machine cannot hold, before any download.

    On the meta device the network takes no memory yet.

    Raises:
        UserError: As ``network``, or the parameters need more memory than there is. Training needs
            as much again for the gradients and for the momentum.
    """
    with torch.device("meta"):
        model = network(config.model, classes=10)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed = weights * (1 if config.run.evaluate else 3) * comm.local_world_size
    available = node_memory(comm)
    if needed > available:
        flags = {MODEL_FLAGS[name]: value for name, value in config.model.arguments().items()}
        given = " ".join(f"{flag} {value}" for flag, value in flags.items())
        raise UserError(
            f"-a {config.model.arch} {given}: the network alone needs {format_bytes(needed)} on "
            f"this node, which has {format_bytes(available)}; choose a smaller one or fewer workers"
        )


def dataset(data: DataConfig) -> Dataset:
    """Load the data set, downloading or decoding it once.

    Raises:
        UserError: The data cannot be had, or is not what it should be.
    """
    return load_dataset(
        data.dataset,
        data.data,
        urls=data.data_url,
        archive=data.data_archive,
        md5=data.data_md5,
        stats=data.stats,
        train_size=data.train_size,
        test_size=data.test_size,
        threads=data.workers,
    )


def splits(dataset: Dataset, config: Config, comm: Comm) -> Splits:
    """Return training, validation and test set.

    Raises:
        UserError: --val-split leaves no image to train on.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}[config.hardware.dtype]
    count, height, width, channels = dataset.train_images.shape
    pad = sampling.PAD
    padded = count * (height + 2 * pad) * (width + 2 * pad) * channels
    on_device = fits_on_device(config.hardware.resident, padded + dataset.test_images.nbytes, comm)

    def image_set(index: np.ndarray | slice, train: bool, augmented: bool) -> ImageSet:
        return ImageSet(
            (dataset.train_images if train else dataset.test_images)[index],
            (dataset.train_labels if train else dataset.test_labels)[index],
            dataset.mean,
            dataset.std,
            device=comm.device,
            on_device=on_device,
            dtype=dtype,
            pad=pad if augmented else 0,
            pad_mode=config.data.pad_mode,
        )

    test = image_set(slice(None), train=False, augmented=False)
    val_split = config.data.val_split
    if not val_split:
        return Splits(image_set(slice(None), train=True, augmented=True), test, test)
    if val_split >= count:
        raise UserError(
            f"--val-split {val_split}: the training set has {count} images; hold out fewer"
        )
    kept, held_out = sampling.split(count, val_split)
    return Splits(
        image_set(kept, train=True, augmented=True),
        image_set(held_out, train=True, augmented=False),
        test,
    )


def plan(config: Config, images: int, comm: Comm) -> EpochPlan:
    """Return the steps of an epoch of this many training images.

    Raises:
        UserError: There are too few images for the workers.
    """
    passes = config.gradient_sync.backward_passes_per_step
    return EpochPlan.of(config.train, passes, images, comm.world_size)


def model(
    config: Config,
    dataset: Dataset,
    splits: Splits,
    loaded: LoadedCheckpoint | None,
    comm: Comm,
) -> tuple[nn.Module, str]:
    """Return the network on its device, with a checkpoint's weights if any, and its memory format.

    The splits' batches get the memory format, too.

    Raises:
        UserError: The checkpoint holds another network.
    """
    if comm.device.type == "cpu":
        retain_freed_memory()
    classes = len(dataset.classes)
    model = network(config.model, classes).to(comm.device, splits.train.scale.dtype)
    memory_format = _memory_format(model, config, loaded, len(splits.train), comm)
    apply_memory_format(model, splits, memory_format, comm)
    if config.train.sync_bn:
        convert_sync_batchnorm(model, comm)
    if loaded:
        given = config.model.arguments()
        shape = {k: v for k, v in model_arguments(config.model.arch).items() if k not in _NO_SHAPE}
        arguments = shape | {k: v for k, v in given.items() if k in shape}
        wanted = describe_model(config.model.arch, arguments | {"num_classes": classes})
        load_model(model, loaded.content, loaded.path, wanted, loaded.flag)
    return model, memory_format


def _memory_format(
    model: nn.Module, config: Config, loaded: LoadedCheckpoint | None, images: int, comm: Comm
) -> str:
    """Return the format of --memory-format, of the checkpoint, or the faster one."""
    if config.hardware.memory_format != "auto":
        return config.hardware.memory_format
    if loaded and loaded.content.get("memory_format") in FORMATS:
        return loaded.content["memory_format"]  # It rounds as before the interruption.
    if config.run.evaluate or config.hardware.deterministic:
        return "contiguous"
    name = run_dir.run_name(config.model.arch, config.model.arguments())
    trained = images * config.train.epochs
    return choose_memory_format(name, model, trained, config.hardware.amp, comm)


def evaluator(model: nn.Module, config: Config, comm: Comm) -> Evaluator:
    """Return what scores the network, with the batch and the precision of the flags."""
    return Evaluator(model, config.train.test_batch, config.hardware.amp, comm)


def recorder(config: Config, storage_device: torch.device, comm: Comm) -> Recorder | None:
    """Return what records the step as a CUDA graph; None where steps run eagerly.

    Args:
        config: Says whether a graph is wanted.
        storage_device: Where the training set is.
        comm: The engine.
    """
    wanted, _ = _resolve_cuda_graph(config, storage_device, comm)
    return RECORDERS[comm.device.type](comm.device) if wanted else None


def log_graph_obstacles(config: Config, storage_device: torch.device, comm: Comm) -> None:
    """Print why steps run eagerly, where that is not what the flags ask for; see ``recorder``."""
    if storage_device != comm.device:
        log.note("the images stay in main memory (--resident): no CUDA graph")
    _, obstacle = _resolve_cuda_graph(config, storage_device, comm)
    if obstacle:
        log.warning(f"--graph on: {obstacle}; training without")


def _resolve_cuda_graph(
    config: Config, storage_device: torch.device, comm: Comm
) -> tuple[bool, str]:
    return resolve_cuda_graph(
        config.hardware.graph,
        comm,
        config.gradient_sync.backward_passes_per_step,
        storage_device,
        config.train.on_nan,
        redraws=bool(config.model.checkpoint_activations and config.model.drop),
    )


def optimizer(
    model: nn.Module, base_rate: float, recorder: Recorder | None, config: Config, comm: Comm
) -> tuple[nn.Module, Optimizer]:
    """Return the network and its optimizer, prepared to average gradients over the workers.

    Args:
        model: The raw network, with its weights.
        base_rate: The learning rate before any decay or warm-up.
        recorder: Records the step, if given; the rate is then a tensor, which can change under it.
        config: The configuration.
        comm: The engine.

    Raises:
        UserError: The engine cannot average gradients in the way of the flags.
    """
    if config.hardware.compile:
        _compile_blocks(model)
    rate: float | Tensor = torch.tensor(base_rate, device=comm.device) if recorder else base_rate
    train = config.train
    optimizer = build_optimizer(model, rate, train.momentum, train.weight_decay, train.nesterov)
    if config.gradient_sync.no_exchange:
        return model, optimizer
    # From here on backward averages the gradients over the workers by all-reduces.
    return comm.prepare(model, optimizer, config.gradient_sync)


def _compile_blocks(model: nn.Module) -> None:
    """Let torch.compile fuse each block of a deep network, or the whole of a shallow one.

    Blocks of a kind are compiled once, so that depth costs little. Names in checkpoints stay.
    """
    rows = [m for m in model.modules() if isinstance(m, nn.Sequential)]
    blocks = [block for row in rows for block in row if list(block.children())]
    for block in blocks or [model]:
        block.compile()


def train_loop(
    model: nn.Module,
    optimizer: Optimizer,
    images: ImageSet,
    plan: EpochPlan,
    recorder: Recorder | None,
    config: Config,
    comm: Comm,
) -> TrainLoop:
    """Return the loop over the steps of an epoch; every rank must call this.

    Args:
        model: The network as ``build.optimizer`` returned it.
        optimizer: The optimizer as ``build.optimizer`` returned it.
        images: The training set.
        plan: The steps of an epoch.
        recorder: Records the step, if given.
        config: The configuration.
        comm: The engine.
    """
    sync = config.gradient_sync
    # A check of each step's gradients costs little where the host does the work itself.
    check_gradients = not sync.no_exchange and (
        comm.device.type == "cpu" or config.train.on_nan == "skip"
    )
    step = Step(
        comm,
        model,
        optimizer,
        config.hardware.amp,
        sync.backward_passes_per_step,
        config.train.on_nan if check_gradients else None,
    )
    return TrainLoop(step, images, plan, recorder, keep_losses=config.run.trace is not None)


def checkpoint_metadata(
    config: Config,
    dataset: Dataset,
    memory_format: str,
    plan: EpochPlan,
    loaded: LoadedCheckpoint | None,
    comm: Comm,
) -> dict[str, Any]:
    """Return what every checkpoint of the run says of it."""
    arch, arguments = config.model.arch, config.model.arguments()
    about = {
        "arch": arch,
        "arch_arguments": {**model_arguments(arch), **arguments},
        "dataset": config.data.dataset,
        "classes": list(dataset.classes),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "memory_format": memory_format,
        "shape": plan.fingerprint(config.data.dataset),
        "options": config.options(),
        "job": comm.job,
        "images": dataset.checksums,
        **provenance.origin(comm),
    }
    start = {name: about[name] for name in provenance.STARTS}
    return provenance.shareable({**about, "earlier": earlier_starts(loaded, start)})
