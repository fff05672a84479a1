"""Generators and discriminators: what both have in common, whatever the architecture.

An architecture is a pair of bodies, listed in :data:`ARCHITECTURES`. The generator's makes an image from latents, the
discriminator's makes features of an image, and :class:`Generator` and :class:`Discriminator` put conditions before,
and the output behind. Images are in [-1, 1] here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gencore.models.gan.config import Conditioning, GANSettings
from gencore.models.gan.networks.conditions import LabelledLatents, LabelPlane
from gencore.models.gan.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from gencore.models.gan.networks.mlp import MLPDiscriminator, MLPGenerator
from gencore.models.gan.networks.norms import Norm
from gencore.models.gan.networks.r3gan import R3GANDiscriminator, R3GANGenerator
from gencore.models.gan.networks.resnet import ResNetDiscriminator, ResNetGenerator
from gencore.nn import spectral_norm
from gencore.noise import Key

__all__ = ["ARCHITECTURES", "Architecture", "Discriminator", "Generator"]

Shape = tuple[int, int, int]


class Architecture(NamedTuple):
    """The bodies of the two players, each made of the settings, the size of its input, and its norms.

    Attributes:
        generator: makes ``(latents, labels) -> images (B, C, H, W)`` before the last tanh, of the latents' size and the
            images' shape.
        discriminator: makes ``(images, key) -> features (B, features)``, of the images' shape.
    """

    generator: Callable[[GANSettings, int, Shape, Callable[[int], Norm]], nn.Module]
    discriminator: Callable[[GANSettings, Shape, Callable[[int], Norm]], nn.Module]


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "mlp": Architecture(
            lambda c, latents, shape, norm: MLPGenerator(latents, c.generator_sizes, shape, norm),
            lambda c, shape, norm: MLPDiscriminator(shape, c.discriminator_sizes, norm, c.dropout),
        ),
        "dcgan": Architecture(
            lambda c, latents, shape, norm: DCGANGenerator(latents, c.generator_channels, shape, norm),
            lambda c, shape, norm: DCGANDiscriminator(shape, c.discriminator_channels, norm, c.dropout),
        ),
        "resnet": Architecture(
            lambda c, latents, shape, norm: ResNetGenerator(latents, c.generator_channels, shape, norm),
            lambda c, shape, norm: ResNetDiscriminator(shape, c.discriminator_channels, norm),
        ),
        "r3gan": Architecture(
            lambda c, latents, shape, norm: R3GANGenerator(latents, c.generator_channels, c.blocks_per_level, shape),
            lambda c, shape, norm: R3GANDiscriminator(shape, c.discriminator_channels, c.blocks_per_level),
        ),
    }
)


class Generator(nn.Module):
    """(B, latent_size) and labels (B,) -> images (B, C, H, W), float32 in [-1, 1].

    Labels go to the batch norms by the rule of projection (conditional batch norm, Dumoulin et al. 2017), and beside
    the latents otherwise.
    """

    def __init__(self, config: GANSettings, image_shape: Shape, conditioning: Conditioning, num_classes: int):
        super().__init__()
        in_norms = conditioning == "projection" and config.has_conditional_norm
        norm = partial(Norm, config.generator_norm, num_classes=num_classes if in_norms else 0)
        self.labels: LabelledLatents | None = None
        size = config.latent_size
        if conditioning != "none" and not in_norms:
            self.labels = LabelledLatents(num_classes, config.embedding_size)
            size += config.embedding_size
        self.body = ARCHITECTURES[config.network].generator(config, size, image_shape, norm)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.labels is not None:
            latents = self.labels(latents, labels)
        output: Tensor = self.body(latents, labels)
        return torch.tanh(output.float())


class Discriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] and labels (B,) -> (B,), a logit of "this is a real image" or a score.

    The output is linear in the features h. With projection (Miyato and Koyama 2018, equation 3) it is v.h + e(y).h + b,
    with embedding the class is a further channel of the image. The key is what dropout depends on; None drops nothing.
    """

    def __init__(self, config: GANSettings, image_shape: Shape, conditioning: Conditioning, num_classes: int):
        super().__init__()
        self.plane: LabelPlane | None = None
        self.projection: nn.Embedding | None = None
        channels, height, width = image_shape
        if conditioning == "embedding":
            self.plane = LabelPlane(num_classes, height, width)
            channels += 1
        norm = partial(Norm, config.discriminator_norm)
        self.body = ARCHITECTURES[config.network].discriminator(config, (channels, height, width), norm)
        features = self.body.features
        assert isinstance(features, int)
        self.head = nn.Linear(features, 1)
        if conditioning == "projection":
            self.projection = nn.Embedding(num_classes, features)
            nn.init.xavier_uniform_(self.projection.weight)
        if config.spectral_norm:
            for module in [*self.modules()]:
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                    spectral_norm(module)

    def forward(self, images: Tensor, labels: Tensor | None = None, key: Key | None = None) -> Tensor:
        if self.plane is not None:
            images = self.plane(images, labels)
        features = self.body(images, key)
        output: Tensor = self.head(features).squeeze(1).float()
        if self.projection is not None:
            output = output + (self.projection(labels).float() * features.float()).sum(1)
        return output
