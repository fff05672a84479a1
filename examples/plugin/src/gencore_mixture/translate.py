"""Translation of paired images after Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks",
CVPR 2017 (pix2pix): a network from an image and noise to another image, an L1 loss, and a discriminator of patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import Key, ops
from gencore.config import field
from gencore.models import Adam, Draw, GenerativeModel, Loss, ModelConfig, ModelPlugin, Optimizer, Phase, Step
from gencore.nn import GroupNorm
from gencore.spec import SOURCE, DataSpec

STREAM_NOISE = 0


@dataclass(frozen=True)
class TranslatorConfig(ModelConfig):
    """Settings of :class:`Translator`."""

    width: int = field(16, ge=1, doc="channels of the first level; the others have twice and four times as many")
    noise_channels: int = field(1, ge=1, doc="channels of normal noise beside those of the source")
    l1: float = field(100.0, ge=0, doc="weight of the mean absolute difference in the generator's loss")
    generator_optimizer: Adam = dataclasses.field(default_factory=lambda: Adam(lr=1e-3, beta1=0.5))
    discriminator_optimizer: Adam = dataclasses.field(default_factory=lambda: Adam(lr=2e-4, beta1=0.5))

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        """The data set has to have pairs."""
        if SOURCE not in spec or spec[SOURCE].kind != "image" or not spec[SOURCE].paired:
            yield f"the data set must have paired images {SOURCE!r}, as pairs:PATH has them"


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution with normalization and SiLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), GroupNorm(1, outputs, activation="silu"))


class UNet(nn.Module):
    """Three levels with skip connections, for images of any size."""

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        self.down = nn.ModuleList(
            [block(inputs, width), block(width, 2 * width, stride=2), block(2 * width, 4 * width, stride=2)]
        )
        self.middle = block(4 * width, 4 * width)
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W) in [0, 1]."""
        full, half, quarter = (images := level(images) for level in self.down)
        hidden = self.middle(quarter)
        for up, skip in zip(self.up, (half, full), strict=True):
            hidden = up(torch.cat([F.interpolate(hidden, size=skip.shape[2:]), skip], dim=1))
        return torch.sigmoid(self.last(hidden))


class Translator(GenerativeModel):
    """A generator G(source, noise) -> image, and a discriminator D(source, image) -> a logit for each patch."""

    config: TranslatorConfig

    def __init__(self, config: TranslatorConfig, spec: DataSpec):
        super().__init__(config, spec)
        self.takes = {SOURCE: "required"}
        (source, *_), (image, *_), width = spec[SOURCE].shape, spec.image_shape, config.width
        self.generator = UNet(source + config.noise_channels, image, width)
        self.discriminator = nn.Sequential(
            block(source + image, width, stride=2), block(width, 2 * width, stride=2), nn.Conv2d(2 * width, 1, 3, 1, 1)
        )

    def phases(self) -> Sequence[Phase]:
        """A step of the generator, then one of the discriminator on the same images."""
        config = self.config
        generator = Optimizer(self.generator.parameters(), config.generator_optimizer)
        discriminator = Optimizer(self.discriminator.parameters(), config.discriminator_optimizer)
        return [
            Phase("generator", self._generator_loss, generator),
            Phase("discriminator", self._discriminator_loss, discriminator, batch_of="generator"),
        ]

    def generate(self, draw: Draw) -> Tensor:
        """The translations of ``draw.conditions["source"]``."""
        return self._translate(draw.conditions[SOURCE], draw.key)

    def _translate(self, source: Tensor, key: Key) -> Tensor:
        shape = (len(source), self.config.noise_channels, *source.shape[2:])
        noise = ops.normal(shape, key.stream(STREAM_NOISE), device=source.device)
        return self.generator(torch.cat([source, noise], dim=1))

    def _generator_loss(self, step: Step) -> Loss:
        source = step.batch.conditions[SOURCE]
        fake = self._translate(source, step.key)
        logits = self.discriminator(torch.cat([source, fake], dim=1))
        l1 = F.l1_loss(fake, step.batch.images)
        return Loss(F.softplus(-logits).mean() + self.config.l1 * l1, {"l1": l1.detach()})

    def _discriminator_loss(self, step: Step) -> Loss:
        source = step.batch.conditions[SOURCE]
        with torch.no_grad():
            fake = self._translate(source, step.key)
        real_logits, fake_logits = (
            self.discriminator(torch.cat([source, images], dim=1)) for images in (step.batch.images, fake)
        )
        accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
        return Loss(F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean(), {"accuracy": accuracy})


plugin = ModelPlugin("translator", "gan", TranslatorConfig, Translator, "translates paired images, after pix2pix")
