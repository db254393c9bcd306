"""Activation checkpointing: less memory for more time (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), whose activations are computed again in backward instead of being kept.

    Results, gradients, dropout masks and batch-norm statistics are those of module(x).
    """
    return checkpoint(
        module,
        x,
        use_reentrant=False,
        # For the same masks again; a CUDA graph, which has its own generator, may not meet it.
        preserve_rng_state=any(getattr(m, "drop", 0) for m in module.modules()),
        context_fn=lambda: (nullcontext(), _statistics_kept(module)),
    )


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Without this the second forward pass would count its batch a second time."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # new statistics get no weight
        norm.num_batches_tracked = torch.tensor(0)
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
