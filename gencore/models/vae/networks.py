"""Encoders and decoders of the variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with SiLU between them (none after the last)."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class MLPEncoder(nn.Module):
    """(B, C, H, W) in [-1, 1] -> (B, outputs), by an MLP."""

    def __init__(self, image_shape: tuple[int, int, int], hidden_sizes: Sequence[int], outputs: int):
        super().__init__()
        self.layers = mlp((math.prod(image_shape), *hidden_sizes, outputs))

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.layers(images.flatten(1))
        return output


class MLPDecoder(nn.Module):
    """(B, latent) -> (B, channels, H, W), by an MLP of the encoder's sizes in reverse."""

    def __init__(self, latent_size: int, hidden_sizes: Sequence[int], shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape
        self.layers = mlp((latent_size, *reversed(hidden_sizes), math.prod(shape)))

    def forward(self, latents: Tensor) -> Tensor:
        output: Tensor = self.layers(latents)
        return output.unflatten(1, self.shape)


def resolutions(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Height and width before the first level and after each: every level halves, rounding up."""
    sizes = [(height, width)]
    for _ in range(levels):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def levels_fault(channels: Sequence[int], image_shape: tuple[int, int, int]) -> str | None:
    """What keeps images from being halved once per level of ``hidden_sizes``, or None."""
    levels, smallest = len(channels), min(image_shape[1:])
    if smallest >= 2**levels:
        return None
    most = smallest.bit_length() - 1
    return f"hidden_sizes: must have at most {most} levels for images of {smallest} pixels, was {levels}"


class ConvEncoder(nn.Module):
    """(B, C, H, W) in [-1, 1] -> (B, outputs): one strided 3x3 convolution per level, then a linear layer."""

    def __init__(self, image_shape: tuple[int, int, int], channels: Sequence[int], outputs: int):
        super().__init__()
        ins = (image_shape[0], *channels[:-1])
        self.levels = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip(ins, channels, strict=True))
        height, width = resolutions(*image_shape[1:], len(channels))[-1]
        self.head = nn.Linear(channels[-1] * height * width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for level in self.levels:
            hidden = F.silu(level(hidden))
        output: Tensor = self.head(hidden.flatten(1))
        return output


class ConvDecoder(nn.Module):
    """(B, latent) -> (B, channels, H, W): a linear layer, then per level nearest upsampling and a 3x3 convolution.

    Upsampling followed by a convolution leaves no checkerboard, as transposed convolutions do (Odena et al. 2016), and
    reaches the exact size of images that are no power of two.
    """

    def __init__(self, latent_size: int, channels: Sequence[int], shape: tuple[int, int, int]):
        super().__init__()
        self.sizes = resolutions(*shape[1:], len(channels))
        self.head = nn.Linear(latent_size, channels[-1] * math.prod(self.sizes[-1]))
        self.start = (channels[-1], *self.sizes[-1])
        reverse = [*reversed(channels), channels[0]]
        self.levels = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(reverse))
        self.last = nn.Conv2d(channels[0], shape[0], 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = F.silu(self.head(latents)).unflatten(1, self.start)
        for level, size in zip(self.levels, self.sizes[-2::-1], strict=True):
            hidden = F.silu(level(F.interpolate(hidden, size=size, mode="nearest")))
        output: Tensor = self.last(hidden)
        return output
