"""Mixed precision: the autocast context, and whether this processor survives it."""

import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from utils.runtime.provenance import ROOT

_PROBE = """
import torch
layer = torch.nn.Conv2d(3, 64, 3, padding=1)
with torch.autocast("cpu", dtype=torch.bfloat16):
    loss = layer(torch.ones(8, 3, 32, 32)).float().sum()
loss.backward()
"""


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context that the forward pass runs in: bf16 autocast for "bf16", else nothing."""
    if amp == "bf16":
        # No weight is used twice in a forward pass, and a CUDA graph must not meet a cached copy.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def at_least_float32(output: Tensor) -> Tensor:
    """Logits as the loss needs them: bf16 has too few digits for a sum over classes."""
    return output.float() if output.dtype == torch.bfloat16 else output


def cpu_runs_bf16() -> bool:
    """Try a bf16 convolution in a child process.

    Some virtual machines advertise instructions that they do not have: the process that uses
    them ends with an illegal instruction, which nothing can catch.
    """
    # Elsewhere, for a random.py where the user stands would pass for Python's own.
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, timeout=120
    )
    return probe.returncode == 0
