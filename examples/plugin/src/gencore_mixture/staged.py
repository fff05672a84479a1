"""A model of two stages: a mixture of Gaussians as the prior of a trained autoencoder, such as gencore's vae.

A variational autoencoder draws latents from N(0, I), but the codes of its images are spread otherwise. A prior that is
fitted to the codes (van den Oord et al. 2017; Dai and Wipf 2019) leaves no such gap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gencore import Key, ops
from gencore.config import ConfigError, field
from gencore.models import (
    Adam,
    Autoencodes,
    Draw,
    GenerativeModel,
    Loss,
    ModelConfig,
    ModelPlugin,
    Optimizer,
    Phase,
    Step,
)
from gencore.spec import Dataset, DataSpec

STREAM_CODES = 0
STREAM_COMPONENT = 1
STREAM_LATENTS = 2
# How many training images the mean and scale of the codes are measured of.
MEASURED = 1024


@dataclass(frozen=True)
class LatentMixtureConfig(ModelConfig):
    """Settings of :class:`LatentMixture`."""

    autoencoder: str = field("", doc="the folder of a run of an autoencoder, such as vae; to be given")
    components: int = field(50, ge=1, doc="number of mixture components")
    optimizer: Adam = dataclasses.field(default_factory=lambda: Adam(lr=0.02))

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        """Every setting has a default, but no folder is a good one."""
        if not self.autoencoder:
            yield "autoencoder: must be given, the folder of a run"


class GaussianMixture(nn.Module):
    """p(z) = sum over k of pi_k N(z; mean_k, diag(deviation_k^2))."""

    def __init__(self, components: int, size: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(components))  # log pi_k, up to a constant
        self.means = nn.Parameter(torch.randn(components, size))
        self.log_deviations = nn.Parameter(torch.zeros(components, size))

    def forward(self, codes: Tensor) -> Tensor:
        """log p(z) in nats, (B,), of codes (B, size)."""
        standardized = (codes[:, None] - self.means) * (-self.log_deviations).exp()
        log_normal = -0.5 * (standardized.square() + math.log(2 * math.pi)) - self.log_deviations
        return torch.logsumexp(log_normal.sum(2) + self.weights.log_softmax(0), dim=1)

    def draw(self, n: int, key: Key) -> Tensor:
        """Codes (n, size): a component each, then its noise."""
        device = self.means.device
        place = ops.uniform((n,), key.stream(STREAM_COMPONENT), device=device)
        component = torch.bucketize(place, self.weights.softmax(0).cumsum(0)[:-1], right=True)
        noise = ops.normal((n, self.means.shape[1]), key.stream(STREAM_LATENTS), device=device)
        return self.means[component] + self.log_deviations[component].exp() * noise


class LatentMixture(GenerativeModel):
    """p(x) = integral of p(x|z) p(z), with p(x|z) of a trained autoencoder and a mixture of Gaussians as p(z)."""

    config: LatentMixtureConfig

    def start(self, load_run: Callable[[Path | str], GenerativeModel], data: Dataset) -> None:
        """Takes the autoencoder and measures where its codes lie."""
        part = load_run(self.config.autoencoder)
        if not isinstance(part, Autoencodes) or part.spec.image_shape != self.spec.image_shape:
            raise ConfigError("latent-mixture", ["autoencoder: must be an autoencoder of images of this shape"])
        self.adopt("autoencoder", part)
        images = data.batch(torch.arange(min(MEASURED, len(data)))).images.to(self.device)
        with torch.no_grad():
            codes = self._encode(images, Key(0))
        self.center.copy_(codes.mean(0))
        self.scale.copy_(codes.std(0).clamp(min=1e-6))

    def adopt(self, name: str, part: GenerativeModel) -> None:
        """Builds the prior for the part's latents, here and whenever a checkpoint is loaded."""
        super().adopt(name, part)
        size = math.prod(part.latent_shape)
        self.register_buffer("center", torch.zeros(size, device=self.device))
        self.register_buffer("scale", torch.ones(size, device=self.device))
        self.prior = GaussianMixture(self.config.components, size).to(self.device)

    def phases(self) -> Sequence[Phase]:
        """One phase: the mean of -log p(z) of the codes. The autoencoder stays as it is."""
        return [Phase("prior", self._loss, Optimizer(self.prior.parameters(), self.config.optimizer))]

    def generate(self, draw: Draw) -> Tensor:
        """The decoded draws of the prior."""
        codes = self.center + self.scale * self.prior.draw(draw.n, draw.key)
        return self.autoencoder.decode(codes.unflatten(1, self.autoencoder.latent_shape))

    def _encode(self, images: Tensor, key: Key) -> Tensor:
        """Draws of q(z|x), (B, size)."""
        return ops.reparameterize(*self.autoencoder.encode(images), key.stream(STREAM_CODES)).flatten(1)

    def _loss(self, step: Step) -> Loss:
        with torch.no_grad():
            codes = (self._encode(step.batch.images, step.key) - self.center) / self.scale
        return Loss(-self.prior(codes).mean())


plugin = ModelPlugin(
    "latent-mixture", "mixture", LatentMixtureConfig, LatentMixture, "mixture of Gaussians as an autoencoder's prior"
)
