"""A mixture of products of Bernoullis (Bishop 2006, section 9.3.3), fitted by gradient ascent of its likelihood."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import Key, ops
from gencore.config import field
from gencore.models import Adam, Batch, GenerativeModel, Loss, ModelConfig, ModelPlugin, Phase

# One stream of the key per purpose, so that no two draws share noise.
STREAM_OBSERVE = 0
STREAM_COMPONENT = 1
STREAM_PIXELS = 2


@dataclass(frozen=True)
class MixtureConfig(ModelConfig):
    """Settings of :class:`Mixture`; the first two, image_shape and num_classes, are those of the data set."""

    components: int = field(100, ge=1, doc="number of mixture components")
    optimizer: Adam = dataclasses.field(default_factory=lambda: Adam(lr=0.05))


class Mixture(GenerativeModel):
    """p(x) = sum over k of pi_k prod over pixels i of Bernoulli(x_i; mu_ki), for binary images x.

    Gray images are binarized, each pixel 1 with its gray value as probability.
    """

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.config: MixtureConfig = config
        pixels = math.prod(config.image_shape)
        self.weights = nn.Parameter(torch.zeros(config.components))  # log pi_k, up to a constant
        # logit mu_ki. All components begin dark and much alike: far apart, the few that are nearest to the images would
        # take them all, and the others would never learn.
        self.logits = nn.Parameter(0.3 * torch.randn(config.components, pixels) - 1.5)

    def phases(self) -> Sequence[Phase]:
        """One phase: the mean of -log p(x)."""
        return [Phase("likelihood", list(self.parameters()), self._loss, self.config.optimizer)]

    def _loss(self, batch: Batch, key: Key) -> Loss:
        log_prob = self.log_likelihood_bound(batch.images, key).mean()
        used = self.weights.softmax(0).square().sum().reciprocal()
        return Loss(-log_prob, {"effective_components": used.detach()})

    def log_likelihood_bound(self, images: Tensor, key: Key, num_samples: int = 1) -> Tensor:
        """log p(x) of the binarized images in nats, (B,). It is exact, so more samples change nothing."""
        noise = ops.uniform(images.shape, key.stream(STREAM_OBSERVE), device=images.device)
        binary = (noise < images).flatten(1).float()
        # log Bernoulli(x; sigmoid(l)) = x l - softplus(l), summed over pixels: a matrix product.
        by_component = binary @ self.logits.T - F.softplus(self.logits).sum(1)
        return torch.logsumexp(by_component + self.weights.log_softmax(0), dim=1)

    @torch.no_grad()
    def sample(self, n: int, key: Key, labels: Tensor | None = None) -> Tensor:
        """``n`` binary images: a component each, then its pixels."""
        if labels is not None:
            raise ValueError("labels must be None: this model is not conditional on classes")
        shape = self.config.image_shape
        draw = ops.uniform((n,), key.stream(STREAM_COMPONENT), device=self.device)
        bounds = self.weights.softmax(0).cumsum(0)[:-1]  # component k has the draws from bounds[k - 1] to bounds[k]
        component = torch.bucketize(draw, bounds, right=True)
        noise = ops.uniform((n, *shape), key.stream(STREAM_PIXELS), device=self.device)
        return (noise < torch.sigmoid(self.logits[component]).unflatten(1, shape)).float()


plugin = ModelPlugin(
    name="mixture",
    family="other",
    config=MixtureConfig,
    build=Mixture,
    summary="mixture of Bernoullis with an exact likelihood",
)
