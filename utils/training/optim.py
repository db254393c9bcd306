"""SGD, and the learning rate as a pure function of the recipe and the position in training."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

# The recipes' learning rates were chosen for this batch; --lr-scaling is relative to it.
REFERENCE_BATCH = 128


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run.

    Attributes:
        base: The learning rate before any decay, with scaling applied.
        milestones: The epochs, counted from 0, from which on the rate is multiplied by gamma.
        gamma: The factor.
        warmup_steps: The optimisation steps at the start with a smaller rate.
        warmup: "constant" trains these steps at a tenth of the rate (He et al. 2016,
            arXiv 1512.03385, section 4.2), "linear" rises from a tenth to the whole rate.
    """

    base: float
    milestones: Sequence[int]
    gamma: float
    warmup_steps: int = 0
    warmup: str = "constant"

    def learning_rate(self, epoch: int, step: int, steps_per_epoch: int) -> float:
        """Return the rate of one optimisation step; ``step`` counts from 0 within the epoch."""
        rate = self.base * self.gamma ** sum(epoch >= m for m in self.milestones)
        done = epoch * steps_per_epoch + step
        if done >= self.warmup_steps:
            return rate
        if self.warmup == "constant":
            return rate / 10
        return rate * (0.1 + 0.9 * done / self.warmup_steps)


def scaled_rate(rate: float, batch: int, scaling: str) -> float:
    """Return the rate for a global batch: times batch / 128, its square root, or as it is."""
    ratio = batch / REFERENCE_BATCH
    return rate * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[scaling]


def build_optimizer(
    model: nn.Module, rate: float | Tensor, momentum: float, weight_decay: float, nesterov: bool
) -> Optimizer:
    """Return SGD over all parameters, with weight decay on all of them as in published recipes.

    The fused kernel reads and writes every number once. A rate in a tensor can change under a
    CUDA graph.
    """
    return SGD(
        model.parameters(),
        lr=rate,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=True,
    )


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use this rate from the next update on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
