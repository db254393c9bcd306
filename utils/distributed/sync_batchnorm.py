"""Batch normalisation over the global batch, for every engine and every device.

PyTorch's own SyncBatchNorm runs on GPUs only and Horovod has another one. This one sums through the
Comm and so behaves the same everywhere. Forward and backward cost one all-reduce each.
"""

from typing import Any

import torch
from torch import Tensor, nn

from utils.distributed.comm import Comm


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch statistics are those of all workers together.

    Evaluation, parameters, buffers and their names are BatchNorm2d's.
    """

    comm: Comm

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W); in training over the batches of all workers."""
        if not self.training:
            return super().forward(input)
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            raise ValueError("SyncBatchNorm2d needs running statistics and a momentum")
        output, mean, var, count = _Normalise.apply(
            input, self.weight, self.bias, self.eps, self.comm
        )
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return output


class _Normalise(torch.autograd.Function):
    """Computes (x - mean) / sqrt(var + eps) * weight + bias with statistics over all workers.

    The sums travel in float64, where the difference of the mean square and the squared mean
    loses nothing that float32 would show.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, comm: Comm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(weight.dtype)
        var, mean = (t.double() for t in torch.var_mean(wide, (0, 2, 3), correction=0))
        images = torch.full_like(mean[:1], x.numel() / x.shape[1])
        sums = torch.cat([images, images * mean, images * (var + mean * mean)])
        count, mean, var = comm.all_reduce_sum_(sums).split([1, len(mean), len(mean)])
        mean = mean / count
        var = (var / count - mean * mean).clamp(min=0)
        inverse_std = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.comm = comm
        ctx.mark_non_differentiable(mean, var, count)
        scale = (inverse_std * weight.double()).to(weight.dtype)
        shift = (bias.double() - mean * inverse_std * weight.double()).to(weight.dtype)
        y = torch.addcmul(_per_channel(shift), wide, _per_channel(scale))
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        wide, grad_wide = x.to(weight.dtype), grad.to(weight.dtype)
        standard = (wide - _per_channel(mean.to(weight.dtype))) * _per_channel(
            inverse_std.to(weight.dtype)
        )
        grad_bias = grad_wide.sum((0, 2, 3))
        grad_weight = (grad_wide * standard).sum((0, 2, 3))
        sums = torch.cat([grad_bias.double(), grad_weight.double()])
        sums = ctx.comm.all_reduce_sum_(sums) / count
        mean_grad, mean_grad_standard = (_per_channel(s.to(weight.dtype)) for s in sums.chunk(2))
        scale = _per_channel((inverse_std * weight.double()).to(weight.dtype))
        grad_x = (grad_wide - mean_grad - standard * mean_grad_standard) * scale
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def convert_sync_batchnorm(model: nn.Module, comm: Comm) -> None:
    """Turn every BatchNorm2d of the model into a SyncBatchNorm2d over this Comm, in place.

    Parameters and buffers stay the same objects under the same names.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # The subclass adds no state, so changing the class keeps parameters, buffers, hooks.
            module.__class__ = SyncBatchNorm2d
            module.comm = comm  # type: ignore[assignment]
