"""Perceptrons, as in Goodfellow et al. (2014)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from gencore.models.gan.networks.norms import Norm
from gencore.nn import Dropout
from gencore.noise import Key

SLOPE = 0.2


class MLPGenerator(nn.Module):
    """(B, latent) -> (B, C, H, W).

    Args:
        latent_size, sizes, image_shape: of the input, of the hidden layers, of the output.
        norm: makes the norm of a hidden layer, behind which is a leaky ReLU.
    """

    def __init__(
        self, latent_size: int, sizes: Sequence[int], image_shape: tuple[int, int, int], norm: Callable[..., Norm]
    ):
        super().__init__()
        self.image_shape = image_shape
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((latent_size, *sizes)))
        self.norms = nn.ModuleList(norm(size, is_flat=True) for size in sizes)
        self.last = nn.Linear((latent_size, *sizes)[-1], math.prod(image_shape))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = latents
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = F.leaky_relu(norm(layer(hidden), labels), SLOPE)
        output: Tensor = self.last(hidden)
        return output.unflatten(1, self.image_shape)


class MLPDiscriminator(nn.Module):
    """(B, C, H, W) -> (B, features): hidden layers with leaky ReLUs, and dropout by the key behind each."""

    def __init__(
        self, image_shape: tuple[int, int, int], sizes: Sequence[int], norm: Callable[..., Norm], dropout: float
    ):
        super().__init__()
        sizes = (math.prod(image_shape), *sizes)
        self.features = sizes[-1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(norm(size, is_flat=True) for size in sizes[1:])
        self.dropouts = nn.ModuleList(Dropout(dropout, stream) for stream in range(len(sizes) - 1))

    def forward(self, images: Tensor, key: Key | None = None) -> Tensor:
        hidden = images.flatten(1)
        for layer, norm, dropout in zip(self.layers, self.norms, self.dropouts, strict=True):
            hidden = F.leaky_relu(norm(layer(hidden)), SLOPE)
            if key is not None:
                hidden = dropout(hidden, key)
        return hidden
