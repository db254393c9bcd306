"""Dropout whose masks belong to the global batch, not to the worker that computes a part of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_rows: tuple[int, int] | None = None


@contextmanager
def rows_of_batch(first: int, count: int) -> Iterator[None]:
    """Inside, inputs of a network are the rows from ``first`` on of a batch of ``count`` images.

    With the same seed for all parts of a batch the masks are those of the whole batch, however it
    is cut. Backward passes belong inside too, because they may compute activations again.

    Args:
        first: The position of the first row in the global batch.
        count: The number of images in the global batch.
    """
    global _rows
    before, _rows = _rows, (first, count)
    try:
        yield
    finally:
        _rows = before


def dropout(x: Tensor, drop: float, training: bool) -> Tensor:
    """Zero elements with probability ``drop`` and scale the others up; in evaluation return x.

    The mask is drawn for the whole batch of ``rows_of_batch`` and cut. Compared with convolutions a
    draw costs little, and a sequential generator has no stream for each row.

    Args:
        x: (B, ...) activations.
        drop: The probability.
        training: Whether the network is in training mode.
    """
    if not training or drop == 0:
        return x
    first, count = _rows or (0, len(x))
    keep = torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device).bernoulli_(1 - drop)
    # A part is copied, or backward would keep the whole mask in memory.
    mine = keep if count == len(x) else keep[first : first + len(x)].clone()
    return x * mine.div_(1 - drop)
