"""The variational autoencoder of Kingma and Welling (2014), as a plugin."""

from gencore.models.base import ModelPlugin
from gencore.models.vae.config import VAEConfig
from gencore.models.vae.model import VAE

__all__ = ["VAE", "VAEConfig", "plugin"]

plugin = ModelPlugin(
    name="vae",
    family="vae",
    config=VAEConfig,
    build=VAE,
    summary="variational autoencoder, MLP or convolutional, Bernoulli or Gaussian likelihood",
)
