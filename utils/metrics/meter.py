"""Loss and accuracy as sums and counts, kept on the device and reduced over the workers once.

Means of means are wrong as soon as two batches differ in size, and reading a value after every
step makes the host wait for the device: so a meter only adds up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed.comm import Comm


class Metrics(NamedTuple):
    """Means over all images of all workers: loss, accuracies in per cent, and how many images."""

    loss: float
    top1: float
    top5: float
    images: int


class Meter:
    """Running sums of loss, correct answers and images on one worker.

    Attributes:
        sums: they stay in the same memory, which a CUDA graph counts on.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, loss_sum: Tensor, output: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            loss_sum: the loss summed over the batch, a scalar.
            output: (B, classes) logits.
            labels: (B,) int64.
        """
        best = output.topk(min(5, output.shape[1]), dim=1).indices  # (B, 5)
        hits = best.eq(labels.view(-1, 1))
        count = torch.full((), len(labels), dtype=torch.float64, device=output.device)
        self.sums += torch.stack([loss_sum.double(), hits[:, 0].sum(), hits.sum(), count])

    def start_from(self, rows: list[list[float]], comm: Comm) -> None:
        """Go on from what ``rows`` has returned, or from nothing where that is empty.

        With as many workers as then each goes on with its own sums, so that they are added up in
        the same order; with others rank 0 takes them all.
        """
        self.sums.zero_()
        if len(rows) == comm.size:
            self.sums.copy_(torch.tensor(rows[comm.rank], dtype=torch.float64))
        elif rows and comm.is_main:
            self.sums.copy_(torch.tensor(rows, dtype=torch.float64).sum(0))

    def rows(self, comm: Comm) -> list[list[float]]:
        """The sums of every worker, a row each: one sum over the workers."""
        return comm.rows(self.sums).tolist()

    def local(self) -> Metrics:
        """What this worker has seen so far; makes the host wait for the device."""
        return _means(self.sums)

    def reduced(self, comm: Comm) -> Metrics:
        """What all workers have seen: one sum over the workers, one copy to the host."""
        return _means(comm.sum_(self.sums.clone()))


def _means(sums: Tensor) -> Metrics:
    loss, top1, top5, count = sums.tolist()
    images = max(count, 1)
    return Metrics(loss / images, 100 * top1 / images, 100 * top5 / images, int(count))
