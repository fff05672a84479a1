"""Definitions of :func:`gencore.ops.group_norm` and of its derivative along a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def group_norm_jvp(
    x: Tensor,
    num_groups: int,
    values: Sequence[Tensor | None],
    direction: Sequence[Tensor | None],
    activation: str | None,
    eps: float,
) -> Tensor:
    """d_y = act'(t) (a d_xhat + xhat d_a + d_b), with a = weight (1 + scale) and
    b = bias (1 + scale) + shift in t = xhat a + b, the argument of the activation.

    ``values`` are weight, bias, scale, shift and bias_in, and ``direction`` is what x and these change by; None where
    one is left out or does not change.
    """
    pixels = [1] * (x.dim() - 2)

    def along_channels(values: Tensor | None, fallback: float) -> Tensor:
        return x.new_full((1, 1, *pixels), fallback) if values is None else values.reshape(-1, x.shape[1], *pixels)

    def of_groups(values: Tensor) -> Tensor:
        return values.expand_as(x).reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)

    weight, bias, scale, shift, bias_in = (
        along_channels(value, fallback) for value, fallback in zip(values, (1.0, 0.0, 0.0, 0.0, 0.0), strict=True)
    )
    d_weight, d_bias, d_scale, d_shift, d_bias_in = (along_channels(value, 0.0) for value in direction[1:])
    u, du = of_groups(x + bias_in), of_groups(d_bias_in if direction[0] is None else direction[0] + d_bias_in)
    centered = u - u.mean(2, keepdim=True)
    inverse = 1 / torch.sqrt(centered.square().mean(2, keepdim=True) + eps)
    xhat = centered * inverse
    d_xhat = inverse * (du - du.mean(2, keepdim=True) - xhat * (du * xhat).mean(2, keepdim=True))
    xhat, d_xhat = xhat.reshape(x.shape), d_xhat.reshape(x.shape)
    gain = 1 + scale
    d_t = (
        weight * gain * d_xhat + xhat * (d_weight * gain + weight * d_scale) + d_bias * gain + bias * d_scale + d_shift
    )
    if activation != "silu":
        return d_t
    t = (xhat * weight + bias) * gain + shift
    s = torch.sigmoid(t)
    return s * (1 + t * (1 - s)) * d_t
