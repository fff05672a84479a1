"""The decoder that shares its weights with the encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.models.vae.networks import MLPEncoder


class TiedDecoder(nn.Module):
    """(B, latent) -> (B, channels, H, W): the encoder's layers in reverse, their weights transposed, biases of its own.

    Hinton and Salakhutdinov (2006), figure 1 ("unrolling"), before the fine-tuning, which parts the weights.
    """

    def __init__(self, encoder: MLPEncoder, hidden_sizes: Sequence[int], shape: tuple[int, int, int]):
        super().__init__()
        # In a tuple, so that its weights are no parameters of the decoder too.
        self._encoder = (encoder,)
        self.shape = shape
        sizes = (*reversed(hidden_sizes), math.prod(shape))
        self.biases = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = latents
        layers = [layer for layer in self._encoder[0].layers if isinstance(layer, nn.Linear)]
        for i, (layer, bias) in enumerate(zip(reversed(layers), self.biases, strict=True)):
            hidden = F.linear(hidden if i == 0 else F.silu(hidden), layer.weight.T, bias)
        return hidden.unflatten(1, self.shape)
