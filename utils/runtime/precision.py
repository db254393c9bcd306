"""Mixed precision: the one forward pass with its loss, and whether this processor survives bf16."""

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils import log
from utils.config.schema import HardwareConfig
from utils.distributed.comm import Comm
from utils.files import ROOT

_PROBE = """
import torch
layer = torch.nn.Conv2d(3, 64, 3, padding=1)
with torch.autocast("cpu", dtype=torch.bfloat16):
    loss = layer(torch.ones(8, 3, 32, 32)).float().sum()
loss.backward()
"""


def forward_loss(
    model: nn.Module, images: Tensor, labels: Tensor, amp: str
) -> tuple[Tensor, Tensor]:
    """Compute logits and loss of a batch.

    Args:
        model: The network, wrapped or not.
        images: (B, 3, H, W).
        labels: (B,) int64.
        amp: "off" or "bf16".

    Returns:
        The cross-entropy summed over the batch, a scalar, and the (B, classes) logits, both in
        float32 at least.
    """
    with _autocast(images.device, amp):
        output = model(images)
    if output.dtype == torch.bfloat16:
        output = output.float()  # bf16 has too few digits for a sum over classes.
    return functional.cross_entropy(output, labels, reduction="sum"), output


def _autocast(device: torch.device, amp: str) -> AbstractContextManager:
    if amp == "bf16":
        # No weight is used twice in a forward pass, and a CUDA graph must not meet a cached copy.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def resolve_precision(hardware: HardwareConfig, comm: Comm) -> HardwareConfig:
    """Return the configuration with --amp off where bf16 is asked for and a CPU cannot compute it.

    Rank 0 tries, so that all workers decide alike.
    """
    if hardware.amp == "off" or comm.device.type != "cpu":
        return hardware
    works = torch.tensor(float(comm.is_main_process and _cpu_runs_bf16()))
    if comm.broadcast_(works).item():
        return hardware
    log.warning("--amp bf16: bf16 convolutions do not run on this processor; training in fp32")
    return replace(hardware, amp="off")


def _cpu_runs_bf16() -> bool:
    """Try a bf16 convolution in a child process.

    Some virtual machines advertise instructions that they do not have. The process that uses them
    ends with an illegal instruction, which nothing can catch.
    """
    # In the project's folder, for a random.py where the user stands would pass for Python's own.
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, timeout=120
    )
    return probe.returncode == 0
