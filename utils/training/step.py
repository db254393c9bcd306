"""One optimisation step, behind one call: forward, loss, backward with all-reduce, update."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from models import rows_of_batch
from utils.data import sampling as order
from utils.distributed.comm import Comm, float_buffers
from utils.errors import NotFinite
from utils.runtime.precision import at_least_float32, autocast


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what a step draws from: the generators of the host and of the device.

    torch.manual_seed goes through the back ends of devices that are not there, too, which costs
    more of the host's time than all else that a replayed step needs.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


class Step:
    """Trains on one share of a global batch.

    Args:
        comm: the engine.
        model, optimizer: as ``comm.wrap`` returned them.
        amp: "off" or "bf16".
        passes: backward passes that a share is cut into; the gradients add up and are exchanged
            once.
        on_nan: "stop", "skip" or "rewind": look at the gradients before they are used, and leave
            everything as it was if they are not finite; None does not look.
    """

    def __init__(
        self,
        comm: Comm,
        model: nn.Module,
        optimizer: Optimizer,
        amp: str,
        passes: int = 1,
        on_nan: str | None = None,
    ) -> None:
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.amp = amp
        self.passes = passes
        self.on_nan = on_nan

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

        Raises:
            NotFinite: on all workers, with ``on_nan``; parameters and momentum are as before, with
                "skip" batch-norm statistics too.
        """
        skips = self.on_nan == "skip"
        before = [buffer.clone() for buffer in float_buffers(self.model)] if skips else []
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
                seed_generators(seed, images.device)
            with exchange, rows_of_batch(start + first, global_batch):
                results.append(self._backward(images[first:last], labels[first:last], scale))
        losses, outputs = zip(*results, strict=True)
        loss = torch.stack(losses).sum()
        if not self.comm.update(self.optimizer, self._may_update):
            for buffer, value in zip(float_buffers(self.model), before, strict=skips):
                buffer.copy_(value)
            broken = self.comm.max_(0 if math.isfinite(loss) else self.comm.rank + 1)
            raise NotFinite(broken - 1 if broken else None)
        return loss, torch.cat(outputs)

    def rehearse(self, images: Tensor, labels: Tensor, global_batch: int) -> None:
        """Forward and backward with all-reduce on a share of a batch, without any effect."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.model.train()
            self._backward(images, labels, self.comm.size / global_batch)
        self.comm.update(self.optimizer, lambda: False)  # the all-reduce is over
        self.optimizer.zero_grad()
        for buffer, value in buffers:
            buffer.copy_(value)

    def _may_update(self) -> bool:
        """Whether all gradients are finite; where nobody looks, they are taken for it.

        Their norm is not finite if one of them is not, or is beyond 1e19, which no training
        survives either. It takes a sixth of the time of the largest of them.
        """
        if self.on_nan is None:
            return True
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return math.isfinite(torch.nn.utils.get_total_norm(gradients))

    def _backward(self, images: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with autocast(images.device, self.amp):
            output = self.model(images)
        output = at_least_float32(output)
        loss = functional.cross_entropy(output, labels, reduction="sum")
        (loss * scale).backward()
        return loss.detach(), output.detach()
