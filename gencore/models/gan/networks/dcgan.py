"""Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional GANs" (2016).

Its guidelines: strided convolutions in place of pooling; batch norm in both players, but not at the generator's output
and the discriminator's input; no hidden layer that is fully connected; ReLU in the generator, with tanh at its end;
leaky ReLU in the discriminator. Kernels are 4x4: a stride of 2 divides them, so that no checkerboard shows (Odena et
al. 2016). Which norm stands where the batch norm does is a choice of the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gencore.models.gan.networks.levels import base_of, channels_at
from gencore.models.gan.networks.norms import Norm
from gencore.nn import Dropout
from gencore.noise import Key

# Section 4: weights from N(0, 0.02), slope of the leaky ReLU.
_DEVIATION, _SLOPE = 0.02, 0.2


class DCGANGenerator(nn.Module):
    """(B, latent) -> (B, C, H, W): the latents are projected to the coarsest resolution, which is doubled on and on.

    Args:
        latent_size, image_shape: of the input, of the output.
        channels: at each resolution from half the image's on; the last for all that are coarser.
        norm: makes the norm of so many channels.
    """

    def __init__(
        self, latent_size: int, channels: Sequence[int], image_shape: tuple[int, int, int], norm: Callable[[int], Norm]
    ):
        super().__init__()
        levels, height, width = base_of(*image_shape[1:])
        widths = [channels_at(channels, level) for level in reversed(range(levels))]
        self.start = (widths[0], height, width)
        self.norms = nn.ModuleList(norm(width) for width in widths)
        self.project = nn.Linear(latent_size, widths[0] * height * width, bias=not self.norms[0].has_bias)
        self.levels = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=not following.has_bias)
            for a, b, following in zip(widths[:-1], widths[1:], self.norms[1:], strict=True)
        )
        self.last = nn.ConvTranspose2d(widths[-1], image_shape[0], 4, stride=2, padding=1)
        _reset(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.project(latents).unflatten(1, self.start)
        hidden = F.relu(self.norms[0](hidden, labels))
        for level, norm in zip(self.levels, self.norms[1:], strict=True):
            hidden = F.relu(norm(level(hidden), labels))
        output: Tensor = self.last(hidden)
        return output


class DCGANDiscriminator(nn.Module):
    """(B, C, H, W) -> (B, features): halved until the coarsest resolution, whose values are the features.

    ``dropout`` leaves out values behind each leaky ReLU, by the key.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], channels: Sequence[int], norm: Callable[[int], Norm], dropout: float
    ):
        super().__init__()
        levels, height, width = base_of(*image_shape[1:])
        widths = [channels_at(channels, level) for level in range(levels)]
        self.features = widths[-1] * height * width
        self.norms = nn.ModuleList(norm(width) for width in widths[1:])
        self.levels = nn.ModuleList([nn.Conv2d(image_shape[0], widths[0], 4, stride=2, padding=1)])
        for a, b, following in zip(widths[:-1], widths[1:], self.norms, strict=True):
            self.levels.append(nn.Conv2d(a, b, 4, stride=2, padding=1, bias=not following.has_bias))
        self.dropouts = nn.ModuleList(Dropout(dropout, stream) for stream in range(levels))
        _reset(self)

    def forward(self, images: Tensor, key: Key | None = None) -> Tensor:
        hidden = images
        for i, (level, dropout) in enumerate(zip(self.levels, self.dropouts, strict=True)):
            hidden = level(hidden)
            hidden = F.leaky_relu(self.norms[i - 1](hidden) if i else hidden, _SLOPE)
            if key is not None:
                hidden = dropout(hidden, key)
        return hidden.flatten(1)


def _reset(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=_DEVIATION)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
