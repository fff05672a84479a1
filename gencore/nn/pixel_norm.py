"""Normalization of the channels of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gencore.nn._checks import check_channels, number
from gencore.nn._precision import widened


class PixelNorm(nn.Module):
    """The channels of every pixel divided by their root mean square: y[n, c] = x[n, c] / sqrt(mean_c x[n, c]^2 + eps).

    It has no parameters. Half precision is computed in float32 and rounded once.

    Args:
        eps: above 0.

    Raises:
        TypeError, ValueError: ``eps`` is not as above.

    >>> PixelNorm()(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]])

    Source: Karras et al., "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (2018),
    section 4.2.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = number("eps", eps, above=0)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...), of the same dtype and memory format."""
        check_channels("input", input)
        x = widened(input)
        return (x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)).to(input.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"
