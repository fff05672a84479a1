"""Noise added to features, as strong as is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gencore import ops
from gencore.arguments import integer
from gencore.nn._checks import check_images
from gencore.noise import Key


class NoiseInjection(nn.Module):
    """y = x + strength * noise: a standard normal value per pixel, the same for all channels; the strength is learned.

    The noise is a pure function of the key: image ``i`` of a batch uses that of ``key.samples(i)``, so that it is the
    same for any batch split, device and memory format. The same key in every call is noise that stays. Strengths start
    as 0.

    Args:
        channels: of the images.
        per_channel: a strength for each channel (StyleGAN) instead of one for all (StyleGAN2).
        stream: of the key; modules that are given the same key have different ones.

    Raises:
        TypeError, ValueError: ``channels`` is no int of at least 1, or ``stream`` none of at least 0.

    >>> NoiseInjection(8)(torch.zeros(2, 8, 4, 4), Key(0)).shape
    torch.Size([2, 8, 4, 4])

    Source: Karras et al., "A Style-Based Generator Architecture for Generative Adversarial Networks" (2019), section 2;
    "Analyzing and Improving the Image Quality of StyleGAN" (2020), section 2.
    """

    def __init__(self, channels: int, *, per_channel: bool = False, stream: int = 0) -> None:
        super().__init__()
        self.channels = integer("channels", channels, least=1)
        self.stream = integer("stream", stream, least=0)
        self.strength = nn.Parameter(torch.zeros(self.channels if per_channel else 1))

    def reset_parameters(self) -> None:
        """Strengths of 0."""
        nn.init.zeros_(self.strength)

    def forward(self, input: Tensor, key: Key | None = None) -> Tensor:
        """(N, channels, H, W) -> the same; without a key, one is drawn from torch's generator."""
        check_images("input", input, self.channels)
        key = (Key.from_generator() if key is None else key).stream(self.stream)
        shape = (input.shape[0], 1, *input.shape[2:])
        kind = torch.promote_types(self.strength.dtype, torch.float32)
        noise = ops.normal(shape, key, dtype=kind, device=input.device)
        # Scaled before it is spread over the channels, which a gradient for one strength then need not be read for.
        return input + (self.strength.reshape(-1, 1, 1) * noise).to(input.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, per_channel={self.strength.numel() > 1}, stream={self.stream}"
