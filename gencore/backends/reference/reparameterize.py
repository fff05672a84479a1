"""Definition of :func:`gencore.ops.reparameterize` and :func:`gencore.ops.reparameterize_kl`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencore.backends.reference.normal import normal
from gencore.noise import Key


def noise(mu: Tensor, key: Key, num_samples: int | None = None) -> Tensor:
    """The eps of z = mu + sigma eps, in mu's dtype: each draw takes whole blocks of four elements of the sample."""
    if num_samples is None:
        return normal(mu.shape, key, dtype=mu.dtype)
    batch, elements = mu.shape[0], math.prod(mu.shape[1:])
    padded = (elements + 3) // 4 * 4
    eps = normal((batch, num_samples, padded), key, dtype=mu.dtype)[..., :elements]
    return eps.transpose(0, 1).reshape(num_samples, *mu.shape)


def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + exp(logvar / 2) eps."""
    return mu + torch.exp(logvar / 2) * eps


def divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """kl_b = 1/2 sum_i (mu_i^2 + exp(logvar_i) - 1 - logvar_i)."""
    terms = mu.square() + torch.exp(logvar) - 1 - logvar
    return terms.reshape(mu.shape[0], math.prod(mu.shape[1:])).sum(1) / 2


def reparameterize(mu: Tensor, logvar: Tensor, key: Key, num_samples: int | None = None) -> Tensor:
    """z, with the noise of a key."""
    return sample(mu, logvar, noise(mu, key, num_samples))


def reparameterize_kl(mu: Tensor, logvar: Tensor, key: Key, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
    """(z, kl), with the noise of a key."""
    return reparameterize(mu, logvar, key, num_samples), divergence(mu, logvar)
