"""The digest by which a checkpoint notices damage."""

import hashlib
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """Return the SHA-256 of tensors, numbers and strings in dicts and lists, in hex.

    Raises:
        ValueError: A tensor is larger than what is stored of it.
    """
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor is larger than what is stored of it")
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            found.update(b"{")
            for key, item in value.items():
                feed(key)
                feed(item)
            found.update(b"}")
        elif isinstance(value, list | tuple):
            found.update(b"[")
            for item in value:
                feed(item)
            found.update(b"]")
        else:
            found.update(f"{value!r};".encode(errors="surrogatepass"))

    feed(value)
    return found.hexdigest()
