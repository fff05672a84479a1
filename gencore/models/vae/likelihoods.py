"""p(x|z) of the variational autoencoder, in nats that mean what they say.

A likelihood turns images into the data x that it is a distribution of (:meth:`observe`), and decoder outputs into
log p(x|z). Where nothing is to be drawn, :meth:`expect` gives the mean of what :meth:`observe` draws. What the bound
then bounds:

- **Bernoulli** (Kingma and Welling 2014, appendix C.1): the probability of *binary* images. Gray images are binarized
  first: stochastically, each pixel 1 with its gray value as probability (Salakhutdinov and Murray 2008; new draws at
  every step, fixed by the key in evaluation), or cut at 1/2.
- **Gaussian** (appendix C.2): the probability of 8-bit images. Uniform noise in [0, 1/256) makes the pixel values
  continuous, and the density minus log 256 per pixel bounds the discrete probability from below (Theis et al. 2016,
  section 3.1); without it, the nats of a density would have no lower limit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import ops
from gencore.noise import Key

_LOG_2_PI = math.log(2 * math.pi)
_LEVELS = 256
_NOISE_STEPS = 1 << 16
# The variance of the uniform noise that makes 8-bit values continuous: no decoder gains from a smaller one.
_LEAST_LOGVAR = -math.log(12 * _LEVELS**2)


class Bernoulli(nn.Module):
    """Pixels in {0, 1}; the decoder gives their logits."""

    outputs_per_channel = 1

    def __init__(self, binarize: Literal["stochastic", "threshold", "none"]):
        super().__init__()
        self.binarize = binarize

    def observe(self, images: Tensor, key: Key) -> Tensor:
        """The binary images (B, C, H, W); with ``binarize="none"`` the gray ones, whose cross-entropy is no bound."""
        if self.binarize == "stochastic":
            return (ops.uniform(images.shape, key, device=images.device) < images).to(images.dtype)
        return self.expect(images)

    def expect(self, images: Tensor) -> Tensor:
        """The mean of ``observe`` over keys: gray images, but binary ones with ``binarize="threshold"``."""
        return (images >= 0.5).to(images.dtype) if self.binarize == "threshold" else images

    def check_observed(self, observed: Tensor) -> None:
        """Raises ValueError for gray images: their cross-entropy is no log probability of anything."""
        if self.binarize == "none" and not torch.all((observed == 0) | (observed == 1)):
            raise ValueError(
                "the bound of a Bernoulli likelihood needs binary images, but the images are gray: set "
                "binarize=stochastic or binarize=threshold, or likelihood=gaussian"
            )

    def log_prob(self, observed: Tensor, outputs: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over pixels: (..., C, H, W) -> (...). Cross-entropy from logits."""
        observed = observed.expand(outputs.shape)
        losses = F.binary_cross_entropy_with_logits(outputs.float(), observed.float(), reduction="none")
        return -losses.flatten(-3).sum(-1)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expected image, in [0, 1]."""
        return torch.sigmoid(outputs.float())


class Gaussian(nn.Module):
    """8-bit pixels made continuous; the decoder gives their mean, and their log-variance is learned.

    ``variance``: ``"shared"`` is one parameter, ``"pixel"`` one parameter per pixel and channel (neither depends on
    z), ``"predicted"`` a second output of the decoder (Kingma and Welling 2014, equation 12).
    """

    def __init__(self, image_shape: tuple[int, int, int], variance: Literal["shared", "pixel", "predicted"]):
        super().__init__()
        self.outputs_per_channel = 2 if variance == "predicted" else 1
        # e^-3: about the variance of pixels in [0, 1] before anything is learned.
        logvar = torch.full(image_shape if variance == "pixel" else (1, 1, 1), -3.0)
        self.logvar: Tensor
        if variance == "predicted":
            self.register_buffer("logvar", logvar)
        else:
            self.logvar = nn.Parameter(logvar)

    def observe(self, images: Tensor, key: Key) -> Tensor:
        """Continuous pixel values in [0, 1): level / 256 plus uniform noise of [0, 1/256)."""
        noise = ops.uniform(images.shape, key, device=images.device)
        # As many bits as float32 holds beside level 255: no sum is rounded up to the next level, nor to 1.
        noise = torch.floor(noise * _NOISE_STEPS) / _NOISE_STEPS
        return (torch.round(images.float() * (_LEVELS - 1)) + noise) / _LEVELS

    def expect(self, images: Tensor) -> Tensor:
        """The mean of ``observe`` over keys: the middle of each level's interval."""
        return (images.float() * (_LEVELS - 1) + 0.5) / _LEVELS

    def check_observed(self, observed: Tensor) -> None:
        """Nothing to refuse."""

    def log_prob(self, observed: Tensor, outputs: Tensor) -> Tensor:
        """log p(x|z) in nats of the 8-bit image, summed over pixels: (..., outputs, H, W) -> (...)."""
        outputs = outputs.float()
        if self.outputs_per_channel == 2:
            mean, raw = outputs.chunk(2, dim=-3)
            logvar = self.logvar + raw
        else:
            mean, logvar = outputs, self.logvar
        # A smooth lower limit (Chua et al. 2018, appendix A.1), so that the gradient never vanishes altogether.
        logvar = _LEAST_LOGVAR + F.softplus(logvar - _LEAST_LOGVAR)
        densities = -0.5 * ((observed - mean - 0.5).square() * torch.exp(-logvar) + logvar + _LOG_2_PI)
        pixels = math.prod(observed.shape[-3:])
        return densities.flatten(-3).sum(-1) - pixels * math.log(_LEVELS)

    def mean(self, outputs: Tensor) -> Tensor:
        """The expected image, limited to [0, 1]; decoder outputs are centered, 0 is mid-gray."""
        mean = outputs.float()[..., : outputs.shape[-3] // self.outputs_per_channel, :, :]
        return (mean + 0.5).clamp(0, 1)
