"""Contiguous (NCHW) or channels-last (NHWC) activations: which trains faster differs.

It depends on the network and the processor, so both are tried once per machine. The answer is
remembered in the user's cache folder. Results are the same but for rounding.
"""

import copy
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.files import write_text
from utils.runtime.provenance import processor
from utils.runtime.timing import seconds_of_step

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Below this many images trying costs more than a better choice could save.
WORTHWHILE = 2_000
# A step of the trial should take about this many seconds, within the limits of images below.
_STEP_SECONDS = 0.15
_LEAST, _MOST = 2, 64
# Channels-last must gain this much before it is chosen, for a trial is a noisy measurement.
_MARGIN = 1.03


def choose_memory_format(name: str, model: nn.Module, images: int, amp: str, comm: Comm) -> str:
    """Return the format that trains this network faster; the same on every rank.

    Args:
        name: A name of the network with its arguments, to remember the answer by.
        model: The network on its device, not wrapped; it is left as it is.
        images: The number of images that the whole run trains on.
        amp: "off" or "bf16".
        comm: The engine; rank 0 tries, the others wait.
    """
    if comm.device.type != "cpu":
        # Tensor cores work on NHWC; the fp32 kernels do not gain.
        return "channels_last" if amp == "bf16" else "contiguous"
    if images < WORTHWHILE:
        return "contiguous"
    faster = torch.zeros(())
    if comm.is_main_process:
        faster.fill_(_remembered(name, model, comm) == "channels_last")
    return "channels_last" if comm.broadcast_(faster).item() else "contiguous"


def apply_memory_format(
    model: nn.Module, sets: Iterable[ImageSet], memory_format: str, comm: Comm
) -> None:
    """Give the sets' batches the format, and the parameters if their gradients can be sent so."""
    for images in sets:
        images.memory_format = FORMATS[memory_format]
    if comm.supports_any_layout:
        model.to(memory_format=FORMATS[memory_format])


def _remembered(name: str, model: nn.Module, comm: Comm) -> str:
    """Return the answer of an earlier run on this machine, or that of a trial."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # The user has no home.
        return _try(model, comm)
    path = cache / "cifar-allreduce" / "memory-format.json"
    parts = [name, str(next(model.parameters()).dtype), str(comm.supports_any_layout)]
    key = " | ".join([*parts, processor(), f"{torch.get_num_threads()} threads", torch.__version__])
    try:
        answers = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        answers = {}  # There is none yet, or a damaged file.
    if answers.get(key) in FORMATS:
        return answers[key]
    answers[key] = _try(model, comm)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(answers, indent=1))
    except OSError:
        pass  # The next run tries again.
    return answers[key]


def _try(model: nn.Module, comm: Comm) -> str:
    """Time forward and backward in both formats in turns, and return the faster one."""
    with torch.random.fork_rng(devices=[]):
        variants = {}
        for name in FORMATS:
            variants[name] = copy.deepcopy(model).train()
            apply_memory_format(variants[name], (), name, comm)
        # The first step pays for memory and compilation.
        _step(variants["contiguous"], "contiguous", _LEAST)
        seconds = _step(variants["contiguous"], "contiguous", _LEAST)
        batch = min(max(int(_STEP_SECONDS / seconds * _LEAST), _LEAST), _MOST)
        for name, variant in variants.items():
            _step(variant, name, batch)
        turns = 3 if seconds < _STEP_SECONDS else 1
        ratios = []
        for _ in range(turns):
            first = _step(variants["contiguous"], "contiguous", batch)
            between = [_step(variants["channels_last"], "channels_last", batch) for _ in range(2)]
            last = _step(variants["contiguous"], "contiguous", batch)
            ratios.append((first + last) / sum(between))
    return "channels_last" if statistics.median(ratios) > _MARGIN else "contiguous"


def _step(model: nn.Module, memory_format: str, batch: int) -> float:
    """Return the seconds of one forward and backward."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(batch, 3, 32, 32, dtype=dtype)
    images = images.contiguous(memory_format=FORMATS[memory_format])
    labels = torch.zeros(batch, dtype=torch.int64)
    return seconds_of_step(model, images, labels)
