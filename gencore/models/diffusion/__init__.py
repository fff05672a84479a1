"""The denoising diffusion model of Ho et al. (2020) and its improvements, as a plugin."""

from gencore.models.base import ModelPlugin
from gencore.models.diffusion.config import DDPMConfig, Sampling
from gencore.models.diffusion.model import DDPM

__all__ = ["DDPM", "DDPMConfig", "Sampling", "plugin"]

plugin = ModelPlugin(
    name="ddpm",
    family="diffusion",
    config=DDPMConfig,
    build=DDPM,
    summary="denoising diffusion model, U-Net, with or without classes, many samplers",
)
