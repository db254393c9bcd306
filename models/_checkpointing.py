"""Activation checkpointing: less memory for more time (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x), and compute its activations again in backward instead of keeping them.

    Results, gradients, dropout masks and batch-norm statistics are those of module(x).
    """
    return checkpoint(
        module,
        x,
        use_reentrant=False,
        # This gives the same masks again. A CUDA graph, which has its own generator, forbids it.
        preserve_rng_state=any(getattr(m, "drop", 0) for m in module.modules()),
        context_fn=lambda: (nullcontext(), _statistics_kept(module)),
    )


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass leaves the statistics of batch norm as they are.

    Otherwise the second forward pass would count its batch a second time.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # New statistics get no weight.
        norm.num_batches_tracked = torch.tensor(0)
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
