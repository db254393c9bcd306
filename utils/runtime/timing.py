"""How long a network takes on this machine: the measure behind --estimate and --memory-format."""

import time

import torch
from torch import Tensor, nn

from utils.runtime.precision import forward_loss


def seconds_of_step(model: nn.Module, images: Tensor, labels: Tensor, amp: str = "off") -> float:
    """Return the seconds of one forward and backward pass, the device's work included.

    Args:
        model: The network.
        images: (B, 3, H, W), on the network's device.
        labels: (B,) int64.
        amp: "off" or "bf16".
    """
    model.zero_grad()
    started = _now(images.device)
    loss, _ = forward_loss(model, images, labels, amp)
    loss.backward()
    return _now(images.device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
