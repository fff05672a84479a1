"""The autoencoder, as a plugin."""

from gencore.models.autoencoder.config import AutoencoderConfig
from gencore.models.autoencoder.model import Autoencoder
from gencore.models.base import ModelPlugin

__all__ = ["Autoencoder", "AutoencoderConfig", "plugin"]

plugin = ModelPlugin(
    name="autoencoder",
    family="autoencoder",
    config=AutoencoderConfig,
    build=Autoencoder,
    summary="deterministic autoencoder, MLP (tied or not) or convolutional",
)
