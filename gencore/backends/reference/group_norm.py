"""Definition of :func:`gencore.ops.group_norm`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias_in: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = act((xhat * weight + bias) * (1 + scale) + shift), xhat the normalized x + bias_in."""

    def along_channels(values: Tensor) -> Tensor:
        return values.reshape(*values.shape, *[1] * (x.dim() - 2))

    u = x if bias_in is None else x + along_channels(bias_in)
    groups = u.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    centered = groups - groups.mean(2, keepdim=True)
    xhat = centered / torch.sqrt(centered.square().mean(2, keepdim=True) + eps)
    t = xhat.reshape(x.shape)
    if weight is not None:
        t = t * along_channels(weight)
    if bias is not None:
        t = t + along_channels(bias)
    if scale is not None:
        t = t * (1 + along_channels(scale))
    if shift is not None:
        t = t + along_channels(shift)
    return t * torch.sigmoid(t) if activation == "silu" else t
