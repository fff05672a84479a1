"""Principal component analysis as a generative model.

Pearson (1901) and Hotelling (1933); that the maximum-likelihood normal distribution with ``latent_size`` free
directions has the principal components as these directions is Tipping and Bishop, "Probabilistic Principal Component
Analysis" (1999), whose equation numbers are below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gencore import ops
from gencore.config import ConfigError
from gencore.models._checks import check_images, check_latents
from gencore.models.base import Draw, GenerativeModel, Phase
from gencore.models.linear.config import PCAConfig
from gencore.models.linear.decomposition import principal_components
from gencore.noise import Key
from gencore.spec import Batch, Dataset, DataSpec

STREAM_PRIOR = 0
STREAM_DEQUANTIZE = 1

_BLOCK = 1000
# The variance of the uniform noise that makes 8-bit values continuous: no direction has less.
_LEAST_VARIANCE = 1 / (12 * 256**2)


class PCA(GenerativeModel):
    """x ~ N(mean, sum_i variance_i u_i u_i^T + noise (I - sum_i u_i u_i^T)), i = 1 .. ``latent_size``.

    u_i are the eigenvectors of the images' covariance with the largest eigenvalues, and ``noise`` is the mean of the
    other eigenvalues (equation 8). Latents are the components in units of their standard deviations, so that their
    prior is N(0, I): ``z_i = u_i (x - mean) / sqrt(variance_i)``.

    It is fitted when a run starts, in one step, and has no phases.

    Attributes:
        mean: (D,), of images of D values.
        directions: (latent_size, D), orthonormal.
        variances: (latent_size,), the eigenvalues, largest first.
        total_variance: (), the sum of all D eigenvalues.
    """

    config: PCAConfig
    mean: Tensor
    directions: Tensor
    variances: Tensor
    total_variance: Tensor

    def __init__(self, config: PCAConfig, spec: DataSpec):
        super().__init__(config, spec)
        values, count = math.prod(spec.image_shape), config.latent_size
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("directions", torch.eye(count, values))
        self.register_buffer("variances", torch.ones(count))
        self.register_buffer("total_variance", torch.tensor(float(values)))

    def start(self, load_run: Callable[[Path | str], GenerativeModel], data: Dataset) -> None:
        """Finds the components of the images.

        Raises:
            ConfigError: fewer images than components.
        """
        if len(data) <= self.config.latent_size:
            fault = f"latent_size: must be below the number of images, {len(data)}, was {self.config.latent_size}"
            raise ConfigError(self.plugin_name or "pca", [fault])

        def blocks() -> Iterator[Tensor]:
            for indices in torch.arange(len(data)).split(_BLOCK):
                yield data.batch(indices).images.flatten(1)

        found = principal_components(blocks, self.config.latent_size)
        self.mean.copy_(found.mean)
        self.directions.copy_(found.directions)
        self.variances.copy_(found.variances)
        self.total_variance.fill_(found.total)

    def phases(self) -> Sequence[Phase]:
        """None: the model is whole when a run has started."""
        return []

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(latent_size,)"""
        return (self.config.latent_size,)

    @property
    def explained_variance(self) -> Tensor:
        """The share of the images' variance along each component, (latent_size,); their sum is at most 1."""
        return self.variances / self.total_variance.clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def principal_images(self) -> Tensor:
        """The components as images, (latent_size, C, H, W); values of either sign."""
        return self.directions.unflatten(1, self.spec.image_shape)

    @property
    def noise(self) -> Tensor:
        """The variance of each direction outside the components, (): the mean of the other eigenvalues (equation 8)."""
        others = self.mean.numel() - self.config.latent_size
        return ((self.total_variance - self.variances.sum()) / max(1, others)).clamp(min=_LEAST_VARIANCE)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the components of images (B, C, H, W), (B, latent_size) each.

        The mean is that of the projection. The variance is that of p(z|x), ``noise / variance_i`` (equation 6 in these
        units).

        Raises:
            ValueError: images of another shape than those of the training.
        """
        check_images(images, self.spec.image_shape)
        variances = self.variances.clamp(min=_LEAST_VARIANCE)
        mean = (images.flatten(1).float() - self.mean) @ self.directions.T / variances.sqrt()
        return mean, (self.noise / variances).log().clamp(max=0).expand_as(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """``mean + sum_i sqrt(variance_i) z_i u_i`` cut to [0, 1], (B, C, H, W), for latents (B, latent_size).

        Raises:
            ValueError: latents of another shape.
        """
        check_latents(latents, self.config.latent_size)
        scale = self.variances.clamp(min=_LEAST_VARIANCE).sqrt()
        images = self.mean + (latents * scale) @ self.directions
        return images.clamp(0, 1).unflatten(1, self.spec.image_shape)

    def generate(self, draw: Draw) -> Tensor:
        """Images of components that are drawn from N(0, I), without the noise outside them."""
        return self.decode(ops.normal((draw.n, *self.latent_shape), draw.key.stream(STREAM_PRIOR), device=self.device))

    @torch.no_grad()
    def log_likelihood_bound(self, batch: Batch, key: Key, num_samples: int = 1) -> Tensor:
        """log p(x) of the 8-bit images in nats, (B,): the density of dequantised images (equation 5), a lower bound
        of the probability of the discrete ones (Theis et al. 2016, section 3.1). One draw is as good as many.

        Raises:
            ValueError: images of another shape.
        """
        check_images(batch.images, self.spec.image_shape)
        levels = torch.round(batch.images.flatten(1).double() * 255)
        noise = ops.uniform(batch.images.shape, key.stream(STREAM_DEQUANTIZE), device=batch.images.device)
        # The moments were measured on images of level / 255; dequantised ones are level / 256 + [0, 1/256).
        centred = (levels + noise.flatten(1).double()) / 256 - (self.mean.double() * 255 + 0.5) / 256
        scale = (255 / 256) ** 2
        variances = (self.variances.double() * scale).clamp(min=_LEAST_VARIANCE)
        rest = (self.noise.double() * scale).clamp(min=_LEAST_VARIANCE)
        along = centred @ self.directions.double().T
        outside = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0)
        values, count = self.mean.numel(), self.config.latent_size
        logs = variances.log().sum() + (values - count) * rest.log() + values * math.log(2 * math.pi)
        density = -0.5 * ((along.square() / variances).sum(1) + outside / rest + logs)
        return (density - values * math.log(256)).float()
