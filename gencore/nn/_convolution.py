"""Convolutions that resample with a filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import ops
from gencore.arguments import integer
from gencore.nn._checks import number

# Of Karras et al. (2019, 2020): a binomial filter, bilinear interpolation twice.
BINOMIAL = (1.0, 3.0, 3.0, 1.0)


def check_factors(up: Any, down: Any) -> tuple[int, int]:
    """``up`` and ``down`` as ints, of which one is 1."""
    up, down = integer("up", up, least=1), integer("down", down, least=1)
    if up > 1 and down > 1:
        raise ValueError(f"up or down must be 1, got up={up} and down={down}")
    return up, down


def filter_of(weights: Sequence[float]) -> Tensor:
    """A separable filter with these weights, whose sum is made 1."""
    if isinstance(weights, (str, Tensor)) or not isinstance(weights, Sequence) or not weights:
        raise TypeError(f"filter must be a sequence of at least one number, got {weights!r}")
    values = [number("every weight of filter", weight) for weight in weights]
    if sum(values) == 0:
        raise ValueError(f"filter must have weights whose sum is not 0, got {values}")
    return torch.tensor(values) / sum(values)


def convolution(x: Tensor, weight: Tensor, filter: Tensor, *, up: int = 1, down: int = 1, groups: int = 1) -> Tensor:
    """Images (N, C, H, W), upsampled, convolved with a kernel (D, C / groups, k, k), k odd, downsampled: one size of
    padding, so that the result has H up // down rows and W up // down columns.

    y = down(filter * weight * up(x)); the filter is left out where nothing is resampled. Nothing is computed with the
    zeros between pixels, nor what downsampling drops: the kernel goes over what is small. Zeros are around the image
    before all convolutions, not between them.
    """
    middle, taps = weight.shape[-1] // 2, filter.numel()
    # That of a module in half precision meets images of another dtype too.
    filter = filter.to(torch.promote_types(x.dtype, torch.float32))
    if up > 1:
        before, behind, gain = (taps + up - 1) // 2, (taps - up) // 2, float(up * up)
        if middle == 0:
            return ops.upfirdn2d(F.conv2d(x, weight, groups=groups), filter, up, 1, (before, behind) * 2, gain=gain)
        # Every pixel is spread by the kernel: as if zeros were inserted behind each pixel but the last.
        y = F.conv_transpose2d(x, _turned(weight, groups), stride=up, groups=groups)
        return ops.upfirdn2d(y, filter, padding=(before - middle, behind - middle + up - 1) * 2, gain=gain)
    if down > 1:
        before, behind = (taps - down + 1) // 2, (taps - down) // 2
        if middle == 0:
            return F.conv2d(ops.upfirdn2d(x, filter, 1, down, (before, behind) * 2), weight, groups=groups)
        y = ops.upfirdn2d(x, filter, padding=(before + middle, behind + middle) * 2)
        return F.conv2d(y, weight, stride=down, groups=groups)
    return F.conv2d(x, weight, padding=middle, groups=groups)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """The weight of the transposed convolution that spreads pixels as a convolution gathers them."""
    outputs, inputs, *kernel = weight.shape
    grouped = weight.reshape(groups, outputs // groups, inputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * inputs, outputs // groups, *kernel).flip(2, 3)
