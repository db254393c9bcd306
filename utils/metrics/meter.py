"""Loss and accuracy as sums and counts, kept on the device and reduced over the workers once.

Means of means are wrong as soon as two batches differ in size, and reading a value after every
step makes the host wait for the device. So a meter only adds up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed.comm import Comm


class Metrics(NamedTuple):
    """Means over images of all workers.

    Attributes:
        loss: The mean cross-entropy.
        top1: The share of images whose likeliest class is right, in per cent.
        top5: The share of images whose five likeliest classes hold the right one, in per cent.
        images: The number of images.
    """

    loss: float
    top1: float
    top5: float
    images: int


class Meter:
    """Running sums of loss, right answers and images on one worker.

    Attributes:
        sums: (4,) float64; it stays in the same memory, which a CUDA graph relies on.
    """

    def __init__(self, device: torch.device) -> None:
        """Start from nothing."""
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, loss_sum: Tensor, output: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            loss_sum: The loss summed over the batch, a scalar.
            output: (B, classes) logits.
            labels: (B,) int64.
        """
        best = output.topk(min(5, output.shape[1]), dim=1).indices  # (B, 5)
        hits = best.eq(labels.view(-1, 1))
        count = torch.full((), len(labels), dtype=torch.float64, device=output.device)
        self.sums += torch.stack([loss_sum.double(), hits[:, 0].sum(), hits.sum(), count])

    def start_from(self, rows: list[list[float]], comm: Comm) -> None:
        """Continue from what ``all_gather`` has returned, or from nothing where that is empty.

        With as many workers as then each continues with its own sums, so that they are added up in
        the same order. With another number rank 0 takes them all.
        """
        self.sums.zero_()
        if len(rows) == comm.world_size:
            self.sums.copy_(torch.tensor(rows[comm.rank], dtype=torch.float64))
        elif rows and comm.is_main_process:
            self.sums.copy_(torch.tensor(rows, dtype=torch.float64).sum(0))

    def all_gather(self, comm: Comm) -> list[list[float]]:
        """Return the sums of every worker, a row each; one all-reduce."""
        return comm.all_gather(self.sums).tolist()

    def local(self) -> Metrics:
        """Return what this worker has seen so far; this makes the host wait for the device."""
        return _means(self.sums)

    def reduced(self, comm: Comm) -> Metrics:
        """Return what all workers have seen; one all-reduce and one copy to the host."""
        return _means(comm.all_reduce_sum_(self.sums.clone()))


def _means(sums: Tensor) -> Metrics:
    loss, top1, top5, count = sums.tolist()
    images = max(count, 1)
    return Metrics(loss / images, 100 * top1 / images, 100 * top5 / images, int(count))
