"""The residual block of diffusion U-Nets, and what changes the resolution between them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.arguments import integer
from gencore.nn.dropout import Dropout
from gencore.nn.group_norm import GroupNorm
from gencore.nn.pointwise import PointwiseConv2d
from gencore.noise import Key

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)


def zeroed(layer: Layer) -> Layer:
    """The layer with zero weights and biases, so that at first a residual block is the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))), embedding)))).

    The embedding passes a linear layer; then it is added before the second norm (Ho et al. 2020), or scales and shifts
    what is normalized: norm2(h) * (1 + scale) + shift (``scale_shift``; Dhariwal and Nichol 2021, equation 5). Either
    is part of the kernel of the norm, as the SiLU is. The shortcut is a 1x1 convolution where the number of channels
    changes, else the identity. ``conv2`` begins as zero.

    Args:
        in_channels, out_channels: multiples of ``num_groups``.
        embedding_size: of the embedding.
        num_groups, eps: of both norms.
        dropout: the probability of a value before ``conv2`` to be dropped in training.
        scale_shift: whether the embedding scales and shifts instead of being added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_size: int,
        *,
        num_groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
        embedding_size = integer("embedding_size", embedding_size)
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(num_groups, in_channels, eps, activation="silu")
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_size, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels, eps, activation="silu")
        self.dropout = Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else PointwiseConv2d(in_channels, out_channels)

    def forward(self, x: Tensor, embedding: Tensor, key: Key | None = None) -> Tensor:
        """x (N, in_channels, H, W), embedding (N, embedding_size), past its activation -> (N, out_channels, H, W).

        With a key, the dropout depends on it; without, on torch's generator.
        """
        hidden = self.conv1(self.norm1(x))
        modulation = self.embedding(embedding)
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            hidden = self.norm2(hidden, scale=scale, shift=shift)
        else:
            hidden = self.norm2(hidden, bias_in=modulation)
        output: Tensor = self.shortcut(x) + self.conv2(self.dropout(hidden, key))
        return output


class Downsample(nn.Module):
    """Half the resolution, rounded up, by a 3x3 convolution of stride 2.

    Args:
        channels: of input and output.
        asymmetric: pad an even size by one pixel behind and none before, as Ho et al.'s code does ("SAME" in
            TensorFlow), instead of one on each side. An odd size has one on each side either way.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        channels = integer("channels", channels)
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:
            height, width = x.shape[-2:]
            x = F.pad(x, (width % 2, 1, height % 2, 1))
        output: Tensor = self.conv(x)
        return output

    def extra_repr(self) -> str:
        return f"asymmetric={self.asymmetric}"


class Upsample(nn.Module):
    """The resolution asked for, by taking the nearest pixel, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        channels = integer("channels", channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """``size`` is (H, W): twice that of ``x``, or one less where halving had rounded up."""
        output: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return output
