"""The networks of Huang et al., "The GAN is dead; long live the GAN! A Modern Baseline GAN" (2024), section 3.4.

Nothing is normalized. A residual branch is 1x1, grouped 3x3, 1x1, twice as wide within; its last convolution begins as
zero and the others are scaled down (Fix-up: Zhang, Dauphin and Ma 2019), so that the variance at the start does not
grow with the depth. Resolutions change by the filter [1, 2, 1], outside of the branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import ops
from gencore.models.gan.networks.levels import base_of, channels_at
from gencore.noise import Key

_EXPANSION = 2
# Channels of a group of the 3x3 convolution.
GROUP_SIZE = 16
_SLOPE = 0.2
# Keeps the variance through a leaky ReLU of this slope (He et al. 2015).
_GAIN = math.sqrt(2 / (1 + _SLOPE**2))
_LAYERS = 3


class _Block(nn.Module):
    """x + 1x1(act(grouped 3x3(act(1x1(x))))). ``depth``: the residual blocks of the whole network."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        inner = _EXPANSION * channels
        self.narrow_in = nn.Conv2d(channels, inner, 1, bias=False)
        self.bias1 = nn.Parameter(torch.zeros(inner))
        self.grouped = nn.Conv2d(inner, inner, 3, padding=1, groups=inner // GROUP_SIZE, bias=False)
        self.bias2 = nn.Parameter(torch.zeros(inner))
        self.narrow_out = nn.Conv2d(inner, channels, 1, bias=False)
        # Fix-up, equation 9: each of the other layers takes its part of the growth with the depth.
        scale = depth ** (-1 / (2 * _LAYERS - 2))
        _scaled(self.narrow_in, scale)
        _scaled(self.grouped, scale)
        nn.init.zeros_(self.narrow_out.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        branch = _activated(self.narrow_in(hidden), self.bias1)
        branch = _activated(self.grouped(branch), self.bias2)
        output: Tensor = hidden + self.narrow_out(branch)
        return output


class _Change(nn.Module):
    """From a resolution to the next finer or coarser one, and to its channels."""

    filter: Tensor

    def __init__(self, channels_in: int, channels_out: int, *, is_up: bool):
        super().__init__()
        self.is_up = is_up
        self.register_buffer("filter", torch.tensor((0.25, 0.5, 0.25)), persistent=False)
        self.conv: nn.Conv2d | None = None
        if channels_in != channels_out:
            self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
            _scaled(self.conv, 1 / _GAIN)

    def forward(self, hidden: Tensor) -> Tensor:
        # A 1x1 convolution and the filter commute; the fewer pixels are convolved.
        if self.is_up:
            return ops.upsample2d(hidden if self.conv is None else self.conv(hidden), self.filter)
        hidden = ops.downsample2d(hidden, self.filter)
        return hidden if self.conv is None else self.conv(hidden)


class R3GANGenerator(nn.Module):
    """(B, latent) -> (B, C, H, W): a learned image at the coarsest resolution, weighted by the latents; then blocks,
    and a doubling with a 1x1 convolution, in turns.

    Args:
        latent_size, image_shape: of the input, of the output.
        channels: at each resolution from the image's own on; the last for all that are coarser.
        blocks: at each resolution.
    """

    def __init__(self, latent_size: int, channels: Sequence[int], blocks: int, image_shape: tuple[int, int, int]):
        super().__init__()
        levels, height, width = base_of(*image_shape[1:])
        widths = [channels_at(channels, level) for level in range(levels, -1, -1)]
        self.basis = nn.Parameter(torch.randn(widths[0], height, width))
        self.weigh = nn.Linear(latent_size, widths[0], bias=False)
        nn.init.normal_(self.weigh.weight, std=1 / math.sqrt(latent_size))
        depth = blocks * len(widths)
        self.ups = nn.ModuleList(_Change(a, b, is_up=True) for a, b in pairwise(widths))
        self.levels = nn.ModuleList(_level(width, blocks, depth) for width in widths)
        self.last = nn.Conv2d(widths[-1], image_shape[0], 1, bias=False)
        _scaled(self.last, 1 / _GAIN)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.basis * self.weigh(latents)[:, :, None, None]
        for i, level in enumerate(self.levels):
            if i:
                hidden = self.ups[i - 1](hidden)
            hidden = level(hidden)
        output: Tensor = self.last(hidden)
        return output


class R3GANDiscriminator(nn.Module):
    """(B, C, H, W) -> (B, features): blocks and halvings in turns; each channel of the coarsest resolution becomes one
    feature by a kernel as large as the picture."""

    def __init__(self, image_shape: tuple[int, int, int], channels: Sequence[int], blocks: int):
        super().__init__()
        levels, height, width = base_of(*image_shape[1:])
        widths = [channels_at(channels, level) for level in range(levels + 1)]
        self.features = widths[-1]
        depth = blocks * len(widths)
        self.first = nn.Conv2d(image_shape[0], widths[0], 1, bias=False)
        _scaled(self.first, 1 / _GAIN)
        self.levels = nn.ModuleList(_level(width, blocks, depth) for width in widths)
        self.downs = nn.ModuleList(_Change(a, b, is_up=False) for a, b in pairwise(widths))
        self.basis = nn.Conv2d(widths[-1], widths[-1], (height, width), groups=widths[-1], bias=False)
        _scaled(self.basis, 1 / _GAIN)

    def forward(self, images: Tensor, key: Key | None = None) -> Tensor:
        hidden = self.first(images)
        for i, level in enumerate(self.levels):
            if i:
                hidden = self.downs[i - 1](hidden)
            hidden = level(hidden)
        output: Tensor = self.basis(hidden)
        return output.flatten(1)


def _level(channels: int, blocks: int, depth: int) -> nn.Sequential:
    """The blocks of a resolution."""
    return nn.Sequential(*(_Block(channels, depth) for _ in range(blocks)))


def _scaled(conv: nn.Conv2d, scale: float) -> None:
    """He's (2015) normal weights for a leaky ReLU behind the layer, times ``scale``."""
    fan_in = conv.weight[0].numel()
    nn.init.normal_(conv.weight, std=scale * _GAIN / math.sqrt(fan_in))


def _activated(hidden: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(hidden + bias.to(hidden.dtype)[:, None, None], _SLOPE)
