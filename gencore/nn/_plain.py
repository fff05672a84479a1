"""Ops that are on their way, by PyTorch's operations: what :mod:`gencore.ops` will offer under the same names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def upfirdn2d(
    x: Tensor, filter: Tensor, up: int = 1, down: int = 1, padding: Sequence[int] = (0, 0, 0, 0), *, gain: float = 1.0
) -> Tensor:
    """Zeros inserted, padding (top, bottom, left, right), a separable filter (K,), every n-th pixel kept."""
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom))
    weight = (torch.outer(filter, filter).flip(0, 1) * gain).to(x.dtype).expand(c, 1, -1, -1)
    return F.conv2d(x, weight, stride=down, groups=c)


def bias_act(x: Tensor, bias: Tensor | None, activation: str, *, slope: float = 0.2, gain: float = 1.0) -> Tensor:
    """gain * act(x + bias[c]) for x (N, C, ...)."""
    if bias is not None:
        x = x + bias.reshape(-1, *[1] * (x.dim() - 2))
    functions = {"linear": lambda x: x, "relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, slope)}
    y: Tensor = functions.get(activation, getattr(F, activation, None))(x)  # type: ignore[misc]
    return y if gain == 1 else y * gain
