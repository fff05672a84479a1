"""Batch norm whose statistics are those of the whole minibatch, where several processes have a part of it each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its batch norms synchronised: PyTorch's own on GPUs, which has no form for the CPU."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = type(f"Synchronized{type(module).__name__}", (_Synchronized, type(module)), {})
    return model


class _Synchronized(nn.modules.batchnorm._BatchNorm):
    """Batch norm (Ioffe and Szegedy 2015) by sums over all processes, which have gradients too."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        dims = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        values = input.float()
        count = torch.tensor([float(input.numel() // input.shape[1])])
        # The number of values has no gradient, and is summed apart.
        dist.all_reduce(count)
        mean = all_reduce(values.sum(dims)) / count
        centred = values - mean.reshape(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
        self._note(mean.detach(), variance.detach(), float(count))
        normed = centred * torch.rsqrt(variance + self.eps).reshape(shape)
        if self.affine:
            normed = normed * self.weight.reshape(shape) + self.bias.reshape(shape)
        return normed.to(input.dtype)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """One step of the running statistics, of the unbiased variance as PyTorch has it."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var.dtype), factor)
