"""Dropout whose masks belong to the global batch, not to the worker that computes a part of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_rows: tuple[int, int] | None = None


@contextmanager
def rows_of_batch(first: int, count: int) -> Iterator[None]:
    """Inside, inputs of a network are the rows from ``first`` on of a batch of ``count`` images.

    Whoever seeds the generator alike for all parts of a batch gets the masks of the whole batch,
    however it is cut. Backward passes belong inside too: they may compute activations again.
    """
    global _rows
    before, _rows = _rows, (first, count)
    try:
        yield
    finally:
        _rows = before


def dropout(x: Tensor, drop: float, training: bool) -> Tensor:
    """Zero a share ``drop`` of the elements and scale the others up; x itself in evaluation.

    The mask is drawn for the whole batch of ``rows_of_batch`` and cut: beside the convolutions a
    draw costs little, and a sequential generator gives rows no streams of their own.
    """
    if not training or drop == 0:
        return x
    first, count = _rows or (0, len(x))
    keep = torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device).bernoulli_(1 - drop)
    # A copy where it is a part only, or backward would hold the whole mask in memory.
    mine = keep if count == len(x) else keep[first : first + len(x)].clone()
    return x * mine.div_(1 - drop)
