"""Residual networks of Miyato et al., "Spectral Normalization for GANs" (2018), tables 3 and 4."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from gencore.models.gan.networks.levels import base_of, channels_at
from gencore.models.gan.networks.norms import Norm
from gencore.noise import Key

# The discriminator halves images down to this, and goes on at this resolution.
_COARSEST = 8
_FLAT_BLOCKS = 2


class _UpBlock(nn.Module):
    """Norm, ReLU, doubling, 3x3, norm, ReLU, 3x3, added to the doubled input."""

    def __init__(self, channels_in: int, channels_out: int, norm: Callable[[int], Norm]):
        super().__init__()
        self.norm1, self.norm2 = norm(channels_in), norm(channels_out)
        self.conv1 = _conv(channels_in, channels_out, 3)
        self.conv2 = _conv(channels_out, channels_out, 3)
        self.shortcut = _conv(channels_in, channels_out, 1)

    def forward(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        branch = self.conv1(_doubled(F.relu(self.norm1(hidden, labels))))
        branch = self.conv2(F.relu(self.norm2(branch, labels)))
        # A 1x1 convolution and the doubling commute: this order is four times cheaper.
        output: Tensor = branch + _doubled(self.shortcut(hidden))
        return output


class _DownBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, 3x3, pooling, added to the pooled input. The first block begins with the 3x3."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        norm: Callable[[int], Norm],
        *,
        is_first: bool = False,
        is_down: bool = True,
    ):
        super().__init__()
        self.is_first, self.is_down = is_first, is_down
        self.norm1 = None if is_first else norm(channels_in)
        self.norm2 = norm(channels_out)
        self.conv1 = _conv(channels_in, channels_out, 3)
        self.conv2 = _conv(channels_out, channels_out, 3)
        changes = is_down or channels_in != channels_out
        self.shortcut = _conv(channels_in, channels_out, 1) if changes else None

    def forward(self, hidden: Tensor) -> Tensor:
        branch = hidden if self.norm1 is None else F.relu(self.norm1(hidden))
        branch = self.conv2(F.relu(self.norm2(self.conv1(branch))))
        if self.is_down:
            # The pooling commutes with the shortcut's 1x1 convolution, as the doubling does.
            branch, hidden = F.avg_pool2d(branch, 2), F.avg_pool2d(hidden, 2)
        return branch + (hidden if self.shortcut is None else self.shortcut(hidden))


class ResNetGenerator(nn.Module):
    """(B, latent) -> (B, C, H, W).

    Args:
        latent_size, image_shape: of the input, of the output.
        channels: at each resolution from the image's own on; the last for all that are coarser.
        norm: makes the norm of so many channels.
    """

    def __init__(
        self, latent_size: int, channels: Sequence[int], image_shape: tuple[int, int, int], norm: Callable[[int], Norm]
    ):
        super().__init__()
        levels, height, width = base_of(*image_shape[1:])
        widths = [channels_at(channels, level) for level in range(levels, -1, -1)]
        self.start = (widths[0], height, width)
        self.project = nn.Linear(latent_size, widths[0] * height * width)
        self.blocks = nn.ModuleList(_UpBlock(a, b, norm) for a, b in pairwise(widths))
        self.norm = norm(widths[-1])
        self.last = _conv(widths[-1], image_shape[0], 3)
        _reset(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.project(latents).unflatten(1, self.start)
        for block in self.blocks:
            hidden = block(hidden, labels)
        output: Tensor = self.last(F.relu(self.norm(hidden, labels)))
        return output


class ResNetDiscriminator(nn.Module):
    """(B, C, H, W) -> (B, features): halved down to 8 pixels or less, two blocks more, and the sum over pixels."""

    def __init__(self, image_shape: tuple[int, int, int], channels: Sequence[int], norm: Callable[[int], Norm]):
        super().__init__()
        most, *_ = base_of(*image_shape[1:])
        smaller = min(image_shape[1:])
        downs = next(times for times in range(1, most + 1) if smaller >> times <= _COARSEST)
        widths = [image_shape[0], *(channels_at(channels, level) for level in range(downs + _FLAT_BLOCKS))]
        self.features = widths[-1]
        self.blocks = nn.ModuleList(
            _DownBlock(a, b, norm, is_first=i == 0, is_down=i < downs) for i, (a, b) in enumerate(pairwise(widths))
        )
        _reset(self)

    def forward(self, images: Tensor, key: Key | None = None) -> Tensor:
        hidden = images
        for block in self.blocks:
            hidden = block(hidden)
        return F.relu(hidden).sum((2, 3))


def _conv(channels_in: int, channels_out: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, padding=size // 2)


def _doubled(hidden: Tensor) -> Tensor:
    return F.interpolate(hidden, scale_factor=2.0, mode="nearest")


def _reset(network: nn.Module) -> None:
    """Glorot's (2010) uniform weights, larger by sqrt(2) where a ReLU is before them; biases are zero."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            gain = math.sqrt(2) if module.weight.shape[2:] == (3, 3) else 1.0
            nn.init.xavier_uniform_(module.weight, gain)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
