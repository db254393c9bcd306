"""--estimate: what a run will need, measured on a few images of the machine at hand."""

import os
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.runtime.precision import at_least_float32, autocast

_STEP_SECONDS = 0.5  # of a step that is timed
_GIB = 2**30


def estimate(
    model: nn.Module, images: ImageSet, tests: int, batch: int, epochs: int, amp: str, comm: Comm
) -> list[str]:
    """Parameters, memory and time of a run, a line each; all ranks measure at the same time.

    Args:
        model: on its device, not wrapped.
        images: the training set.
        tests: images of the set that each epoch validates on.
        batch: the global batch.
        epochs: of the whole run.
        amp: "off" or "bf16".
        comm: the engine.
    """
    share = -(-batch // comm.size)
    saved, seconds = _measure(model, images, share, amp)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = saved * share
    train = seconds * len(images) / comm.size
    valid = seconds * tests / comm.size / 3  # forward only
    return [
        f"parameters  {parameters:,}: {in_bytes(weights)}, and twice that for gradients and "
        "momentum",
        f"activations {in_bytes(activations)} per worker for {share} of {batch} images "
        f"({in_bytes(saved)} an image)",
        f"memory      about {in_bytes(3 * weights + activations)} per worker, "
        f"{in_bytes((3 * weights + activations) * comm.local_size)} on this node; "
        f"it has {in_bytes(node_memory(comm))}",
        f"speed       about {comm.size / seconds:,.1f} images/s, communication left out",
        f"time        about {_duration(train + valid)} an epoch, of which training "
        f"{_duration(train)}; {_duration(epochs * (train + valid))} for {epochs} epochs",
    ]


def _measure(model: nn.Module, images: ImageSet, share: int, amp: str) -> tuple[float, float]:
    """Bytes that an image leaves for backward, and seconds of its forward and backward."""
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    count = min(2, share)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _step(model, images, count, amp)
    seconds = _step(model, images, count, amp)
    larger = min(share, max(count, round(count * _STEP_SECONDS / seconds)))
    _step(model, images, larger, amp)  # pays for memory
    seconds = min(_step(model, images, larger, amp) for _ in range(2))
    return sum(sizes.values()) / count, seconds / larger


def _step(model: nn.Module, images: ImageSet, count: int, amp: str) -> float:
    """Seconds of forward and backward on the first images."""
    device = images.device
    index = torch.arange(count, device=images.home) % len(images)
    augmentation = torch.zeros(len(images), 3, dtype=torch.int64, device=images.home)
    batch, labels = images.batch(index, augmentation)
    model.zero_grad()
    started = _now(device)
    with autocast(device, amp):
        output = model(batch)
    functional.cross_entropy(at_least_float32(output), labels).backward()
    return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def node_memory(comm: Comm) -> int:
    """Bytes of this node's main memory, or of the memory of the GPUs that its workers use."""
    if comm.device.type == "cuda":
        return torch.cuda.get_device_properties(comm.device).total_memory * comm.local_size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds."""
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
