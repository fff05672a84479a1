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
from gencore.models import Adam, Draw, GenerativeModel, Loss, ModelConfig, ModelPlugin, Optimizer, Phase, Step
from gencore.spec import Batch, DataSpec

# One stream of the key per purpose, so that no two draws share noise.
STREAM_OBSERVE = 0
STREAM_COMPONENT = 1
STREAM_PIXELS = 2


@dataclass(frozen=True)
class MixtureConfig(ModelConfig):
    """Settings of :class:`Mixture`. What the images are like is no setting: the data set says it."""

    components: int = field(100, ge=1, doc="number of mixture components")
    optimizer: Adam = dataclasses.field(default_factory=lambda: Adam(lr=0.05))


class Mixture(GenerativeModel):
    """p(x) = sum over k of pi_k prod over pixels i of Bernoulli(x_i; mu_ki), for binary images x.

    Gray images are binarized, each pixel 1 with its gray value as probability.
    """

    config: MixtureConfig

    def __init__(self, config: MixtureConfig, spec: DataSpec):
        super().__init__(config, spec)
        pixels = math.prod(spec.image_shape)
        self.weights = nn.Parameter(torch.zeros(config.components))  # log pi_k, up to a constant
        # logit mu_ki. All components begin dark and much alike: far apart, the few that are nearest to the images would
        # take them all, and the others would never learn.
        self.logits = nn.Parameter(0.3 * torch.randn(config.components, pixels) - 1.5)

    def phases(self) -> Sequence[Phase]:
        """One phase: the mean of -log p(x)."""
        return [Phase("likelihood", self._loss, Optimizer(self.parameters(), self.config.optimizer))]

    def _loss(self, step: Step) -> Loss:
        log_prob = self.log_likelihood_bound(step.batch, step.key).mean()
        used = self.weights.softmax(0).square().sum().reciprocal()
        return Loss(-log_prob, {"effective_components": used.detach()})

    def log_likelihood_bound(self, batch: Batch, key: Key, num_samples: int = 1) -> Tensor:
        """log p(x) of the binarized images in nats, (B,). It is exact, so more samples change nothing."""
        noise = ops.uniform(batch.images.shape, key.stream(STREAM_OBSERVE), device=batch.images.device)
        binary = (noise < batch.images).flatten(1).float()
        # log Bernoulli(x; sigmoid(l)) = x l - softplus(l), summed over pixels: a matrix product.
        by_component = binary @ self.logits.T - F.softplus(self.logits).sum(1)
        return torch.logsumexp(by_component + self.weights.log_softmax(0), dim=1)

    def generate(self, draw: Draw) -> Tensor:
        """``draw.n`` binary images: a component each, then its pixels."""
        shape, key = self.spec.image_shape, draw.key
        place = ops.uniform((draw.n,), key.stream(STREAM_COMPONENT), device=self.device)
        bounds = self.weights.softmax(0).cumsum(0)[:-1]  # component k has the draws from bounds[k - 1] to bounds[k]
        component = torch.bucketize(place, bounds, right=True)
        noise = ops.uniform((draw.n, *shape), key.stream(STREAM_PIXELS), device=self.device)
        return (noise < torch.sigmoid(self.logits[component]).unflatten(1, shape)).float()


plugin = ModelPlugin(
    name="mixture",
    family="mixture",
    config=MixtureConfig,
    build=Mixture,
    summary="mixture of Bernoullis with an exact likelihood",
)

# The same plugin under a name of its own, with other defaults: listed and trained like any other.
small = plugin.preset("small-mixture", "mixture of a few Bernoullis", components=10)
