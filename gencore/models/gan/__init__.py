"""Generative adversarial networks (Goodfellow et al. 2014), as a plugin, and the systems that are presets of it.

The presets have the objective, the penalties, the norms and the optimisers of their papers. Their networks are small,
for images like MNIST's and CIFAR-10's on a CPU; ``generator_channels`` and ``discriminator_channels`` are those of the
papers where docs/gan.md says so.
"""

import dataclasses
from typing import Any

from gencore.models.base import ModelPlugin
from gencore.models.gan.config import GANConfig, GANSettings, WGANConfig
from gencore.models.gan.model import GAN

__all__ = [
    "GAN",
    "GANConfig",
    "GANSettings",
    "WGANConfig",
    "cgan",
    "dcgan",
    "lsgan",
    "plugin",
    "r3gan",
    "sngan",
    "wgan",
    "wgan_gp",
]

plugin = ModelPlugin(
    name="gan",
    family="gan",
    config=GANConfig,
    build=GAN,
    summary="generative adversarial network of many networks, objectives and penalties",
)

_CONVOLUTIONAL: dict[str, Any] = {"network": "dcgan", "latent_size": 100, "r1": 0.0}


def _adam(lr: float, beta1: float, beta2: float) -> dict[str, dict[str, float]]:
    """The same for both players."""
    settings = {"lr": lr, "beta1": beta1, "beta2": beta2}
    return {"generator_optimizer": settings, "discriminator_optimizer": settings}


# Radford et al., "Unsupervised Representation Learning with Deep Convolutional GANs" (2016), section 4.
dcgan = plugin.preset(
    "dcgan",
    "convolutional GAN by the five guidelines of Radford et al. (2016)",
    **_CONVOLUTIONAL,
    generator_norm="batch",
    discriminator_norm="batch",
    generator_channels=[64, 128, 256, 512],
    discriminator_channels=[64, 128, 256, 512],
    **_adam(2e-4, 0.5, 0.999),
)

# Mao et al., "Least Squares Generative Adversarial Networks" (2017).
lsgan = dcgan.preset("lsgan", "DCGAN with least squares in place of logits", objective="least-squares")

# Mirza and Osindero, "Conditional Generative Adversarial Nets" (2014); the networks are DCGAN's.
cgan = dcgan.preset("cgan", "DCGAN whose players are both told the class", conditioning="embedding")

# Arjovsky et al., "Wasserstein GAN" (2017), Algorithm 1. Section 4.3 trains critics with and without batch norm.
wgan = dataclasses.replace(
    plugin.preset(
        "wgan",
        "Wasserstein GAN with clipped weights, trained by RMSprop",
        train={"batch_size": 64},
        **_CONVOLUTIONAL,
        generator_norm="batch",
        discriminator_norm="batch",
        generator_channels=[64, 128, 256, 512],
        discriminator_channels=[64, 128, 256, 512],
        objective="wasserstein",
        weight_clip=0.01,
        discriminator_steps=5,
    ),
    config=WGANConfig,
)

# Gulrajani et al., "Improved Training of Wasserstein GANs" (2017), Algorithm 1; section 4 has the critic's layer norm.
wgan_gp = plugin.preset(
    "wgan-gp",
    "Wasserstein GAN with a gradient penalty",
    train={"batch_size": 64},
    **_CONVOLUTIONAL,
    generator_norm="batch",
    discriminator_norm="layer",
    generator_channels=[64, 128, 256, 512],
    discriminator_channels=[64, 128, 256, 512],
    objective="wasserstein",
    gradient_penalty=10.0,
    discriminator_steps=5,
    **_adam(1e-4, 0.0, 0.9),
)

# Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (2018), appendix B.4; Miyato and Koyama,
# "cGANs with Projection Discriminator" (2018).
sngan = plugin.preset(
    "sngan",
    "residual GAN with spectral norm and the hinge loss; with classes, projection and conditional batch norm",
    train={"batch_size": 64},
    network="resnet",
    latent_size=128,
    r1=0.0,
    generator_norm="batch",
    spectral_norm=True,
    conditioning="auto",
    objective="hinge",
    discriminator_steps=5,
    **_adam(2e-4, 0.0, 0.9),
)

# Huang et al., "The GAN is dead; long live the GAN! A Modern Baseline GAN" (2024), appendix D.
r3gan = plugin.preset(
    "r3gan",
    "residual GAN without norms, relativistic pairs, penalties R1 and R2",
    train={"batch_size": 64, "schedule": "cosine", "schedule_end": 0.25, "average": {"decay": 0.999}},
    network="r3gan",
    generator_norm="none",
    conditioning="none",
    objective="relativistic",
    r1=1.0,
    r2=1.0,
    penalty_final=0.1,
    augmentation={"target": None, "probability": 0.0, "final": 0.3},
    **_adam(2e-4, 0.0, 0.99),
)
