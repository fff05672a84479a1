"""The settings of the variational autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gencore.config import field
from gencore.models.base import ModelConfig
from gencore.models.optimizers import Adam
from gencore.models.vae.networks import levels_fault
from gencore.spec import DataSpec


@dataclass(frozen=True)
class VAEConfig(ModelConfig):
    """Settings of :class:`gencore.models.vae.VAE`.

    The defaults learn MNIST and scikit-learn's digits; their likelihood is one of binarized images, so that the bound
    is honest (see :mod:`gencore.models.vae.likelihoods`).
    """

    network: Literal["mlp", "conv"] = field("mlp", doc="kind of encoder and decoder")
    hidden_sizes: tuple[int, ...] = field(
        (512, 512),
        ge=1,
        le=1 << 16,
        doc="mlp: units of each layer; conv: channels of each level, each level half the resolution",
    )
    latent_size: int = field(40, ge=1, le=1 << 16, doc="dimensions of the latent z")
    likelihood: Literal["bernoulli", "gaussian"] = field("bernoulli", doc="p(x|z) of a pixel")
    variance: Literal["shared", "pixel", "predicted"] = field(
        "shared", doc="gaussian: one learned variance for all pixels, one per pixel, or one per pixel from the decoder"
    )
    binarize: Literal["stochastic", "threshold", "none"] = field(
        "stochastic",
        doc="bernoulli: draw each pixel with its gray value as probability, cut at 1/2, or take it as it is",
    )
    beta: float = field(1.0, ge=0, doc="weight of the KL term in the loss (Higgins et al. 2017); 1 is the bound itself")
    num_samples: int = field(1, ge=1, doc="draws of z per image in the loss")
    optimizer: Adam = dataclasses.field(default_factory=Adam)

    def check(self) -> Iterable[str]:
        if self.network == "conv" and not self.hidden_sizes:
            yield "hidden_sizes: must not be empty for network='conv', was ()"

    def faults_with(self, spec: DataSpec) -> Iterable[str]:
        if self.network == "conv" and (fault := levels_fault(self.hidden_sizes, spec.image_shape)):
            yield fault
