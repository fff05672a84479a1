"""The variational autoencoder of Kingma and Welling (2014), as a plugin."""

from gencore.models.base import ModelPlugin
from gencore.models.vae.config import VAEConfig
from gencore.models.vae.model import VAE

__all__ = ["VAE", "VAEConfig", "beta_vae", "plugin"]

plugin = ModelPlugin(
    name="vae",
    family="vae",
    config=VAEConfig,
    build=VAE,
    summary="variational autoencoder, MLP or convolutional, Bernoulli or Gaussian likelihood",
)

# Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework" (2017).
beta_vae = plugin.preset("beta-vae", "VAE whose KL term weighs more, for codes that fall apart into factors", beta=4.0)
