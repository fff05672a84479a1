"""The generative adversarial network of Goodfellow et al. (2014), as a plugin."""

from gencore.models.base import ModelPlugin
from gencore.models.gan.config import GANConfig
from gencore.models.gan.model import GAN

__all__ = ["GAN", "GANConfig", "plugin"]

plugin = ModelPlugin(
    name="gan",
    family="gan",
    config=GANConfig,
    build=GAN,
    summary="generative adversarial network, minimax or non-saturating loss",
)
