"""A model of two stages: a mixture of Gaussians as the prior of a trained autoencoder, such as gencore's vae.

A variational autoencoder draws latents from N(0, I), but the codes of its images lie elsewhere. A prior that is fitted
to the codes in a second stage closes the gap (Dai and Wipf 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
MEASURED = 1024  # training images whose codes say where codes lie


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


class LatentMixture(GenerativeModel):
    """p(x) = integral of p(x|z) p(z), with p(x|z) of a trained autoencoder and a mixture of Gaussians as p(z).

    The mixture is one of standardized codes c = (z - center) / scale::

        p(c) = sum over k of pi_k N(c; mean_k, diag(deviation_k^2))
    """

    config: LatentMixtureConfig
    autoencoder: Autoencodes
    center: Tensor
    scale: Tensor

    def start(self, load_run: Callable[[str], GenerativeModel], data: Dataset) -> None:
        """Takes the autoencoder and measures where its codes lie."""
        self.adopt("autoencoder", load_run(self.config.autoencoder))
        images = data.batch(torch.arange(min(MEASURED, len(data)))).images.to(self.device)
        with torch.no_grad():
            latents = self._latents(images, Key(0))
        self.center.copy_(latents.mean(0))
        self.scale.copy_(latents.std(0))

    def on_adopt(self, name: str, part: GenerativeModel) -> None:
        """Makes a mixture that fits the part's latents, when a run begins and whenever a checkpoint is loaded."""
        if not isinstance(part, Autoencodes) or part.spec.image_shape != self.spec.image_shape:
            shape = "x".join(map(str, self.spec.image_shape))
            raise ConfigError("latent-mixture", [f"autoencoder: must be a run of an autoencoder of images {shape}"])
        components, size = self.config.components, math.prod(part.latent_shape)
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.weights = nn.Parameter(torch.zeros(components))  # log pi_k, up to a constant
        self.means = nn.Parameter(torch.randn(components, size))
        self.log_deviations = nn.Parameter(torch.zeros(components, size))

    def phases(self) -> Sequence[Phase]:
        """One phase: the mean of -log p(c). The autoencoder stays as it is."""
        prior = (self.weights, self.means, self.log_deviations)
        return [Phase("prior", self._loss, Optimizer(prior, self.config.optimizer))]

    def generate(self, draw: Draw) -> Tensor:
        """The decoded draws of the mixture: a component each, then its noise."""
        place = ops.uniform((draw.n,), draw.key.stream(STREAM_COMPONENT), device=self.device)
        component = torch.bucketize(place, self.weights.softmax(0).cumsum(0)[:-1], right=True)
        noise = ops.normal((draw.n, self.means.shape[1]), draw.key.stream(STREAM_LATENTS), device=self.device)
        latents = self.center + self.scale * (self.means[component] + self.log_deviations[component].exp() * noise)
        return self.autoencoder.decode(latents.unflatten(1, self.autoencoder.latent_shape))

    def log_prob(self, images: Tensor, key: Key) -> Tensor:
        """log p(c) in nats, (B,), of a code of each image, drawn from its q(z|x)."""
        with torch.no_grad():
            codes = (self._latents(images, key) - self.center) / self.scale
        standardized = (codes[:, None] - self.means) * (-self.log_deviations).exp()
        log_normal = -0.5 * (standardized.square() + math.log(2 * math.pi)) - self.log_deviations
        return torch.logsumexp(log_normal.sum(2) + self.weights.log_softmax(0), dim=1)

    def _latents(self, images: Tensor, key: Key) -> Tensor:
        """Draws of q(z|x), (B, size)."""
        return ops.reparameterize(*self.autoencoder.encode(images), key.stream(STREAM_CODES)).flatten(1)

    def _loss(self, step: Step) -> Loss:
        return Loss(-self.log_prob(step.batch.images, step.key).mean())


plugin = ModelPlugin(
    "latent-mixture", "mixture", LatentMixtureConfig, LatentMixture, "mixture of Gaussians as an autoencoder's prior"
)
