"""Generators and discriminators. Whatever the kind, a generator is ``latents -> images`` and a discriminator is
``(images, key) -> logits``: the key is what its dropout depends on, None when it drops nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.nn import Dropout
from gencore.noise import Key

_SLOPE = 0.2


class MLPGenerator(nn.Module):
    """(B, latent) -> (B, C, H, W) in [0, 1].

    Layer norm, where others have batch norm: an image then does not depend on those it is made with.
    """

    def __init__(self, latent_size: int, hidden_sizes: Sequence[int], image_shape: tuple[int, int, int]):
        super().__init__()
        self.image_shape = image_shape
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise((latent_size, *hidden_sizes)):
            layers += [nn.Linear(size_in, size_out), nn.LayerNorm(size_out), nn.LeakyReLU(_SLOPE)]
        layers.append(nn.Linear((latent_size, *hidden_sizes)[-1], math.prod(image_shape)))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        output: Tensor = self.layers(latents)
        return torch.sigmoid(output.float()).unflatten(1, self.image_shape)


class MLPDiscriminator(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> (B,) logits of "this is a real image"."""

    def __init__(self, image_shape: tuple[int, int, int], hidden_sizes: Sequence[int], dropout: float):
        super().__init__()
        sizes = (math.prod(image_shape), *hidden_sizes)
        self.layers = nn.ModuleList(nn.Linear(size_in, size_out) for size_in, size_out in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], 1)
        self.dropouts = nn.ModuleList(Dropout(dropout, stream) for stream in range(len(hidden_sizes)))

    def forward(self, images: Tensor, key: Key | None = None) -> Tensor:
        hidden = 2 * images.flatten(1) - 1
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            hidden = F.leaky_relu(layer(hidden), _SLOPE)
            if key is not None:
                hidden = dropout(hidden, key)
        output: Tensor = self.head(hidden)
        return output.squeeze(1).float()
