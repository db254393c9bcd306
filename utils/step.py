"""One optimisation step, behind one call: forward, loss, backward with all-reduce, update."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from models import rows_of_batch
from utils import order
from utils.comm import Comm
from utils.precision import at_least_float32, autocast


class Step:
    """Trains on one share of a global batch.

    Args:
        comm: the engine.
        model, optimizer: as ``comm.wrap`` returned them.
        amp: "off" or "bf16".
        passes: backward passes that a share is cut into; the gradients add up and are exchanged
            once.
    """

    def __init__(
        self, comm: Comm, model: nn.Module, optimizer: Optimizer, amp: str, passes: int = 1
    ) -> None:
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.amp = amp
        self.passes = passes

    def __call__(
        self, images: Tensor, labels: Tensor, global_batch: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Train on this worker's share of a batch of global_batch images.

        The engines average gradients over the workers. Each worker's loss is its sum divided by
        the mean share (global_batch / workers), not by its own: the average is then the exact
        mean over the global batch, also when shares differ by an image. The seed, the same on all
        workers, is of the dropout masks, which are the global batch's too; None leaves the
        generators as they are.

        Returns:
            The loss summed over the share, and its (B, classes) logits.
        """
        self.optimizer.zero_grad()
        cuts = [order.share(0, len(images), k, self.passes) for k in range(self.passes)]
        scale = self.comm.size / global_batch
        start, _ = order.share(0, global_batch, self.comm.rank, self.comm.size)
        results = []
        for k, (first, last) in enumerate(cuts):
            # The last backward averages the gradients over the workers: all-reduce, overlapped
            # with it. Those before it communicate nothing.
            waiting = k < len(cuts) - 1
            exchange = self.comm.accumulating(self.model) if waiting else nullcontext()
            if seed is not None:
                torch.manual_seed(seed)
            with exchange, rows_of_batch(start + first, global_batch):
                results.append(self._backward(images[first:last], labels[first:last], scale))
        self.optimizer.step()
        losses, outputs = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.cat(outputs)

    def _backward(self, images: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with autocast(images.device, self.amp):
            output = self.model(images)
        output = at_least_float32(output)
        loss = functional.cross_entropy(output, labels, reduction="sum")
        (loss * scale).backward()
        return loss.detach(), output.detach()
