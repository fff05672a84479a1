"""The autoencoder: Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks" (2006)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import ops
from gencore.models._checks import check_images, check_latents
from gencore.models.autoencoder.config import AutoencoderConfig
from gencore.models.autoencoder.networks import TiedDecoder
from gencore.models.base import Draw, GenerativeModel, Loss, Phase, Step
from gencore.models.optimizers import Optimizer
from gencore.models.vae.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from gencore.spec import DataSpec

STREAM_PRIOR = 0


class Autoencoder(GenerativeModel):
    """An encoder, image -> code, and a decoder, code -> image, that give back the image together.

    Nothing but the error of the image is trained, so that nothing makes the codes normal. A batch norm without
    parameters gives each dimension of the code mean 0 and variance 1, which the first layer of the decoder could undo.
    So N(0, I) has the first two moments of each dimension of the codes; samples from it show what the codes' actual
    distribution is like beyond them, and what a variational autoencoder adds.
    """

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, spec: DataSpec):
        super().__init__(config, spec)
        shape, hidden, size = spec.image_shape, config.hidden_sizes, config.latent_size
        self.encoder: nn.Module
        self.decoder: nn.Module
        if config.network == "conv":
            self.encoder, self.decoder = ConvEncoder(shape, hidden, size), ConvDecoder(size, hidden, shape)
        else:
            encoder = MLPEncoder(shape, hidden, size)
            self.encoder = encoder
            self.decoder = TiedDecoder(encoder, hidden, shape) if config.tied else MLPDecoder(size, hidden, shape)
        self.standardize = nn.BatchNorm1d(size, affine=False)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(latent_size,)"""
        return (self.config.latent_size,)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of images (B, C, H, W), (B, latent_size) float32, and the log of their variance: -inf.

        Raises:
            ValueError: images of another shape than those of the training.
        """
        check_images(images, self.spec.image_shape)
        codes = self._codes(images)
        return codes, torch.full_like(codes, -math.inf)

    def decode(self, latents: Tensor) -> Tensor:
        """The images (B, C, H, W) float32 in [0, 1] of codes (B, latent_size).

        Raises:
            ValueError: latents of another shape.
        """
        check_latents(latents, self.config.latent_size)
        return torch.sigmoid(self.decoder(latents).float())

    def generate(self, draw: Draw) -> Tensor:
        """Images of codes drawn from N(0, I); see :meth:`GenerativeModel.generate`."""
        return self.decode(ops.normal((draw.n, *self.latent_shape), draw.key.stream(STREAM_PRIOR), device=self.device))

    def phases(self) -> Sequence[Phase]:
        """One phase: the error of the reconstructed image, summed over pixels and averaged over the minibatch."""
        return [Phase("reconstruction", self._loss, Optimizer(self.parameters(), self.config.optimizer))]

    def _codes(self, images: Tensor) -> Tensor:
        codes: Tensor = self.standardize(self.encoder(2 * images - 1).float())
        return codes

    def _loss(self, step: Step) -> Loss:
        images = step.batch.images
        logits = self.decoder(self._codes(images)).float()
        squares = (torch.sigmoid(logits) - images).square()
        if self.config.loss == "cross-entropy":
            error = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
        else:
            error = squares
        metrics = {"mean_squared_error": squares.detach().mean()}
        return Loss(error.flatten(1).sum(1).mean(), metrics)
