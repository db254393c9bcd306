"""Loss and accuracy as sums and counts, kept on the device and reduced over the workers once.

Means of means are wrong as soon as two batches differ in size, and reading a value after every
step makes the host wait for the device: so a meter only adds up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.comm import Comm


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

    def start_from(self, sums: list[float]) -> None:
        """Go on from sums that ``collapse`` has returned; on one worker only."""
        self.sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def collapse(self, comm: Comm) -> list[float]:
        """Move all workers' sums to rank 0 and return them: one sum over the workers.

        A run that goes on from these numbers then adds in the same order as this one.
        """
        total = comm.sum_(self.sums.clone())
        self.sums.copy_(total if comm.is_main else torch.zeros_like(total))
        return total.tolist()

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
