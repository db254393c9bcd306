"""One optimisation step behind one call: forward, loss, backward with all-reduce, update."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import rows_of_batch
from utils.data.sampling import shard
from utils.distributed.comm import Comm, float_buffers
from utils.errors import NotFinite
from utils.runtime.device import seed_generators
from utils.runtime.precision import forward_loss


class Step:
    """Trains on one worker's shard of a global batch.

    Args:
        comm: The engine.
        model: The network as ``comm.prepare`` returned it.
        optimizer: The optimizer as ``comm.prepare`` returned it.
        amp: "off" or "bf16".
        accumulation_steps: The backward passes that a shard is cut into; their gradients
            accumulate and are averaged once.
        on_nan: "stop", "skip" or "rewind" checks the gradients before they are used, and leaves
            everything as it was if they are not finite; None does not check them.
    """

    def __init__(
        self,
        comm: Comm,
        model: nn.Module,
        optimizer: Optimizer,
        amp: str,
        accumulation_steps: int = 1,
        on_nan: str | None = None,
    ) -> None:
        """Keep the collaborators; nothing is computed yet."""
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.amp = amp
        self.accumulation_steps = accumulation_steps
        self.on_nan = on_nan

    def __call__(
        self, images: Tensor, labels: Tensor, global_batch: int, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """Train on this worker's shard of a batch.

        The engines average gradients over the workers. Each worker's loss is its sum divided by
        the mean shard (global_batch / world_size), not by its own. So the average is the exact
        mean over the global batch, also when shards differ by an image.

        Args:
            images: (B, 3, H, W), the shard.
            labels: (B,) int64.
            global_batch: The images of all workers.
            seed: The seed of the dropout masks, which are the global batch's too; the same on all
                workers. None leaves the generators as they are.

        Returns:
            The loss summed over the shard, and its (B, classes) logits.

        Raises:
            NotFinite: On all workers, with ``on_nan``. Parameters and momentum are as before, with
                "skip" batch-norm statistics too.
        """
        skips = self.on_nan == "skip"
        before = [buffer.clone() for buffer in float_buffers(self.model)] if skips else []
        self.optimizer.zero_grad()
        count = self.accumulation_steps
        cuts = [shard(0, len(images), k, count) for k in range(count)]
        scale = self.comm.world_size / global_batch
        start, _ = shard(0, global_batch, self.comm.rank, self.comm.world_size)
        results = []
        for k, (first, last) in enumerate(cuts):
            # The last backward averages the gradients over the workers by all-reduces that overlap
            # with it. Those before it communicate nothing.
            accumulates = k < count - 1
            context = self.comm.no_sync(self.model) if accumulates else nullcontext()
            if seed is not None:
                seed_generators(seed, images.device)
            with context, rows_of_batch(start + first, global_batch):
                results.append(self._backward(images[first:last], labels[first:last], scale))
        losses, outputs = zip(*results, strict=True)
        loss = torch.stack(losses).sum()
        if not self.comm.optimizer_step(self.optimizer, self._gradients_are_finite):
            for buffer, value in zip(float_buffers(self.model), before, strict=skips):
                buffer.copy_(value)
            broken = self.comm.all_reduce_max(0 if math.isfinite(loss) else self.comm.rank + 1)
            raise NotFinite(broken - 1 if broken else None)
        return loss, torch.cat(outputs)

    def dry_run(self, images: Tensor, labels: Tensor, global_batch: int) -> None:
        """Run forward and backward with all-reduce on a shard, without any effect."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.model.train()
            self._backward(images, labels, self.comm.world_size / global_batch)
        self.comm.optimizer_step(self.optimizer, lambda: False)  # Waits for the all-reduce.
        self.optimizer.zero_grad()
        for buffer, value in buffers:
            buffer.copy_(value)

    def _gradients_are_finite(self) -> bool:
        """Return whether all gradients are finite; without ``on_nan`` they are not checked.

        Their norm is not finite if one of them is not, or is beyond 1e19, which no training
        survives either. It takes a sixth of the time of the largest of them.
        """
        if self.on_nan is None:
            return True
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return math.isfinite(torch.nn.utils.get_total_norm(gradients))

    def _backward(self, images: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        loss, output = forward_loss(self.model, images, labels, self.amp)
        (loss * scale).backward()
        return loss.detach(), output.detach()
