"""Weights alone, as a safetensors file: what published runs keep and tools/export.py writes.

The header of such a file has room for words. Ours holds, as JSON, what the weights are of, and a
digest of all of it. Reading runs no code, whoever has written the file.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint.digest import digest

# The entry of the header that holds what we say of the weights.
_ENTRY = "cifar-allreduce"
_LENGTH_BYTES = 8
# What can be said of weights; utils/checkpoint/fields.py says what each may hold.
_SAID = frozenset({"network", "dataset", "trained_epochs", "classes", "mean", "std"})


def pack(weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return the content of a safetensors file.

    Args:
        weights: The tensors by name.
        about: What is to be said of them: ``network`` in words, and of the keys of a checkpoint
            ``dataset``, ``classes``, ``mean`` and ``std``; and ``trained_epochs``. This is not the
            key ``epoch``, from which a training would go on.
    """
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    said = {**about, "digest": _digest(tensors, about)}
    return save(tensors, metadata={_ENTRY: json.dumps(said, sort_keys=True)})


def in_half_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with their floating-point tensors rounded to float16."""
    return {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def is_safetensors(content: bytes) -> bool:
    """Return whether bytes look like a safetensors file: a length, and a JSON header so long."""
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    begins = content[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
    return begins and length <= len(content) - _LENGTH_BYTES


def unpack(content: bytes) -> dict[str, Any]:
    """Return what a safetensors file holds, as a checkpoint without history.

    Half-precision tensors in it become float32, in which networks are built.

    Raises:
        Exception: The file is damaged, or what it says of its weights makes no sense.
    """
    from safetensors.torch import load

    tensors = load(content)
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    about = json.loads(header.get("__metadata__", {}).get(_ENTRY, "{}"))
    if about:
        _check(tensors, about)
    half = (torch.float16, torch.bfloat16)
    weights = {k: v.float() if v.dtype in half else v for k, v in tensors.items()}
    return {**about, "state_dict": weights, "weights_alone": True}


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    return digest([json.dumps(dict(about), sort_keys=True), dict(sorted(tensors.items()))])


def _check(tensors: Mapping[str, Tensor], about: Any) -> None:
    """Raise a ValueError unless a file says of its weights what it may, and is not damaged.

    The digest is taken out.
    """
    if not isinstance(about, dict) or about.pop("digest", "") != _digest(tensors, about):
        raise ValueError("damaged: its digest does not fit")
    if not about.keys() <= _SAID:
        raise ValueError("its header is not understood")
