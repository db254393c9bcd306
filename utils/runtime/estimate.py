"""--estimate: what a run will need, measured on a few images of the machine at hand."""

import os

import torch
from torch import Tensor, nn

from utils import log
from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.runtime.timing import seconds_of_step

_STEP_SECONDS = 0.5  # The time that a timed step should take.
_GIB = 2**30


def log_estimate(
    model: nn.Module,
    images: ImageSet,
    validation_images: int,
    batch: int,
    epochs: int,
    amp: str,
    comm: Comm,
) -> None:
    """Print parameters, memory and time of a run; all ranks measure at the same time.

    Args:
        model: The network on its device, not wrapped.
        images: The training set.
        validation_images: The number of images that each epoch validates on.
        batch: The global batch.
        epochs: The epochs of the whole run.
        amp: "off" or "bf16".
        comm: The engine.
    """
    shard = -(-batch // comm.world_size)
    saved, seconds = _measure(model, images, shard, amp)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = saved * shard
    train = seconds * len(images) / comm.world_size
    # An evaluation is a forward pass only.
    valid = seconds * validation_images / comm.world_size / 3
    lines = [
        f"parameters  {parameters:,}: {format_bytes(weights)}, and twice that for gradients and "
        "momentum",
        f"activations {format_bytes(activations)} per worker for {shard} of {batch} images "
        f"({format_bytes(saved)} an image)",
        f"memory      about {format_bytes(3 * weights + activations)} per worker, "
        f"{format_bytes((3 * weights + activations) * comm.local_world_size)} on this node; "
        f"it has {format_bytes(node_memory(comm))}",
        f"speed       about {comm.world_size / seconds:,.1f} images/s, communication left out",
        f"time        about {_duration(train + valid)} an epoch, of which training "
        f"{_duration(train)}; {_duration(epochs * (train + valid))} for {epochs} epochs",
    ]
    log.info("\n".join(lines))


def _measure(model: nn.Module, images: ImageSet, shard: int, amp: str) -> tuple[float, float]:
    """Return bytes that an image leaves for backward, and seconds of its forward and backward."""
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    count = min(2, shard)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _step(model, images, count, amp)
    seconds = _step(model, images, count, amp)
    larger = min(shard, max(count, round(count * _STEP_SECONDS / seconds)))
    _step(model, images, larger, amp)  # The first one pays for memory.
    seconds = min(_step(model, images, larger, amp) for _ in range(2))
    return sum(sizes.values()) / count, seconds / larger


def _step(model: nn.Module, images: ImageSet, count: int, amp: str) -> float:
    """Return the seconds of forward and backward on the first images."""
    index = torch.arange(count, device=images.storage_device) % len(images)
    augmentation = torch.zeros(len(images), 3, dtype=torch.int64, device=images.storage_device)
    return seconds_of_step(model, *images.batch(index, augmentation), amp)


def node_memory(comm: Comm) -> int:
    """Return the bytes of this node's main memory, or of the GPUs that its workers use."""
    if comm.device.type == "cuda":
        return torch.cuda.get_device_properties(comm.device).total_memory * comm.local_world_size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def format_bytes(count: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    """Return the two largest of days, hours, minutes and seconds."""
    parts = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = round(seconds)
    words: list[str] = []
    for size, unit in parts:
        if left >= size or words:
            words.append(f"{left // size} {unit}")
            left %= size
    return " ".join(words[:2])
