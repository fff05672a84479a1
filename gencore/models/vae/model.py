"""The variational autoencoder: Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014 (arXiv 1312.6114).

Equation numbers below are of that paper; the importance-weighted bound is of Burda, Grosse and Salakhutdinov,
"Importance Weighted Autoencoders", ICLR 2016 (arXiv 1509.00519).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gencore import ops
from gencore.models._checks import check_images, check_latents, check_num_samples
from gencore.models.base import Draw, GenerativeModel, Loss, Phase, Step
from gencore.models.optimizers import Optimizer
from gencore.models.vae.config import VAEConfig
from gencore.models.vae.likelihoods import Bernoulli, Gaussian
from gencore.models.vae.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from gencore.noise import Key
from gencore.spec import Batch, DataSpec

# One stream of the key per purpose, so that no two draws of a step share noise.
STREAM_POSTERIOR = 0
STREAM_OBSERVE = 1
STREAM_PRIOR = 2

# The importance-weighted bound holds this many draws of a batch at a time. A constant, because the draws of chunk c
# are those of ``key.fold_in(c)``: another value would be other (equally good) noise.
_DRAWS_PER_CHUNK = 10

_LOG_2_PI = math.log(2 * math.pi)


class VAE(GenerativeModel):
    """q(z|x) = N(mu(x), diag exp(logvar(x))), p(z) = N(0, I), p(x|z) Bernoulli or Gaussian by pixel.

    Everything random is a pure function of the key: sample ``i`` of a batch uses the noise of ``key.samples(i)``.
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig, spec: DataSpec):
        super().__init__(config, spec)
        shape, hidden = spec.image_shape, config.hidden_sizes
        self.likelihood: Bernoulli | Gaussian
        if config.likelihood == "bernoulli":
            self.likelihood = Bernoulli(config.binarize)
        else:
            self.likelihood = Gaussian(shape, config.variance)
        output_shape = (shape[0] * self.likelihood.outputs_per_channel, *shape[1:])
        self.encoder: nn.Module
        self.decoder: nn.Module
        if config.network == "mlp":
            self.encoder = MLPEncoder(shape, hidden, 2 * config.latent_size)
            self.decoder = MLPDecoder(config.latent_size, hidden, output_shape)
        else:
            self.encoder = ConvEncoder(shape, hidden, 2 * config.latent_size)
            self.decoder = ConvDecoder(config.latent_size, hidden, output_shape)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(latent_size,)"""
        return (self.config.latent_size,)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), (B, latent_size) float32 each, for images (B, C, H, W) in [0, 1].

        The encoder sees the mean of what it sees in training: a Bernoulli model that learned from drawn binary images
        sees gray ones, as the pixels' probabilities; with ``binarize="threshold"`` they are cut here too.

        Raises:
            ValueError: images of another shape than those of the training.
        """
        check_images(images, self.spec.image_shape)
        return self._posterior(self.likelihood.expect(images))

    def decode(self, latents: Tensor) -> Tensor:
        """The expected images E[x|z], (B, C, H, W) float32 in [0, 1], for latents (B, latent_size).

        Raises:
            ValueError: latents of another shape.
        """
        check_latents(latents, self.config.latent_size)
        return self.likelihood.mean(self.decoder(latents))

    def generate(self, draw: Draw) -> Tensor:
        """Expected images of draws from the prior; see :meth:`GenerativeModel.generate`."""
        shape = (draw.n, self.config.latent_size)
        return self.decode(ops.normal(shape, draw.key.stream(STREAM_PRIOR), device=self.device))

    def phases(self) -> Sequence[Phase]:
        """One phase: the negative bound, averaged over the minibatch (equation 10)."""
        return [Phase("elbo", self._loss, Optimizer(self.parameters(), self.config.optimizer))]

    def _posterior(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), for what the likelihood observed."""
        mu, logvar = self.encoder(2 * observed - 1).float().chunk(2, dim=1)
        return mu, logvar

    def _loss(self, step: Step) -> Loss:
        observed = self.likelihood.observe(step.batch.images, step.key.stream(STREAM_OBSERVE))
        log_likelihood, kl = self._terms(observed, step.key, self.config.num_samples)
        log_likelihood, kl = log_likelihood.mean(), kl.mean()
        metrics = {"elbo": log_likelihood - kl, "log_likelihood": log_likelihood, "kl": kl}
        return Loss(self.config.beta * kl - log_likelihood, {name: value.detach() for name, value in metrics.items()})

    def _terms(self, observed: Tensor, key: Key, num_samples: int) -> tuple[Tensor, Tensor]:
        """The two terms of the bound (equation 7), (B,) each: the mean of log p(x|z) over the draws, and the KL."""
        mu, logvar = self._posterior(observed)
        latents, kl = ops.reparameterize_kl(mu, logvar, key.stream(STREAM_POSTERIOR), num_samples=num_samples)
        return self._log_likelihood(observed, latents).mean(0), kl

    def _log_likelihood(self, observed: Tensor, latents: Tensor) -> Tensor:
        """log p(x|z), (S, B), for latents (S, B, latent_size)."""
        outputs: Tensor = self.decoder(latents.flatten(0, 1))
        return self.likelihood.log_prob(observed, outputs.unflatten(0, latents.shape[:2]))

    @torch.no_grad()
    def log_likelihood_bound(self, batch: Batch, key: Key, num_samples: int = 1) -> Tensor:
        """A lower bound of log p(x), nats per image, (B,) float32.

        With one draw, the bound with the KL in closed form (Kingma and Welling 2014, equation 7)::

            log p(x|z) - KL(q(z|x) || p(z)),   z ~ q(z|x)

        With k > 1 draws the importance-weighted one (Burda et al. 2016, equation 8), never looser on average::

            log 1/k sum_i p(x, z_i) / q(z_i|x),   z_i ~ q(z|x)

        x is the binarized or dequantised image (:mod:`gencore.models.vae.likelihoods`), with noise from ``key``. Ten
        draws of the batch are in memory at a time.

        Raises:
            TypeError: ``num_samples`` is no int.
            ValueError: it is below 1, the images have another shape, or are gray but should be binary.
        """
        num_samples, images = check_num_samples(num_samples), batch.images
        check_images(images, self.spec.image_shape)
        observed = self.likelihood.observe(images, key.stream(STREAM_OBSERVE))
        self.likelihood.check_observed(observed)
        if num_samples == 1:
            log_likelihood, kl = self._terms(observed, key, 1)
            return log_likelihood - kl
        mu, logvar = self._posterior(observed)
        total = torch.full(images.shape[:1], -math.inf, device=images.device)
        for chunk, first in enumerate(range(0, num_samples, _DRAWS_PER_CHUNK)):
            draws = min(_DRAWS_PER_CHUNK, num_samples - first)
            chunk_key = key.stream(STREAM_POSTERIOR).fold_in(chunk)
            latents = ops.reparameterize(mu, logvar, chunk_key, num_samples=draws)
            log_weights = self._log_likelihood(observed, latents) + _log_prior_ratio(latents, mu, logvar)
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        return total - math.log(num_samples)


def _log_prior_ratio(latents: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log p(z) - log q(z|x), (S, B); the normalising constants of the two normal densities cancel."""
    squares = (latents - mu).square() * torch.exp(-logvar) + logvar - latents.square()
    return 0.5 * squares.sum(-1)
