"""The settings of the generative adversarial network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from gencore.config import field
from gencore.models.base import ModelConfig
from gencore.models.optimizers import Adam


def _adam() -> Adam:
    # beta1 = 0.5: momentum makes the two players circle each other (Radford et al. 2016, section 3).
    return Adam(lr=5e-4, beta1=0.5)


@dataclass(frozen=True)
class GANConfig(ModelConfig):
    """Settings of :class:`gencore.models.gan.GAN`. The defaults show all classes of MNIST and scikit-learn's digits."""

    generator_sizes: tuple[int, ...] = field((256, 512), ge=1, le=1 << 16, doc="units of the generator's hidden layers")
    discriminator_sizes: tuple[int, ...] = field(
        (512, 256), ge=1, le=1 << 16, doc="units of the discriminator's hidden layers"
    )
    latent_size: int = field(64, ge=1, le=1 << 16, doc="dimensions of the latent z, standard normal")
    loss: Literal["non-saturating", "minimax"] = field("non-saturating", doc="of the generator")
    discriminator_steps: int = field(1, ge=1, doc="k of Algorithm 1: steps of the discriminator per generator step")
    label_smoothing: float = field(0.0, ge=0, lt=0.5, doc="the discriminator's target for real images is 1 less this")
    dropout: float = field(0.0, ge=0, lt=1, doc="fraction of the discriminator's hidden units left out")
    gradient_penalty: float = field(1.0, ge=0, doc="weight of the R1 penalty on real images; 0: none")
    generator_optimizer: Adam = dataclasses.field(default_factory=_adam)
    discriminator_optimizer: Adam = dataclasses.field(default_factory=_adam)
