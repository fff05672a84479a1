"""The denoising diffusion model of Ho et al. (2020) and its improvements, as a plugin."""

from gencore.models.base import ModelPlugin
from gencore.models.diffusion.config import DDPMConfig, Sampling
from gencore.models.diffusion.model import DDPM

__all__ = ["DDPM", "DDPMConfig", "Sampling", "improved_ddpm", "plugin"]

plugin = ModelPlugin(
    name="ddpm",
    family="diffusion",
    config=DDPMConfig,
    build=DDPM,
    summary="denoising diffusion model, U-Net, with or without classes, many samplers",
)

# Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021).
improved_ddpm = plugin.preset(
    "improved-ddpm",
    "diffusion model with a cosine schedule and a learned variance",
    schedule="cosine",
    variance="learned_range",
    scale_shift=True,
)
