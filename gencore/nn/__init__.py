"""Modules on top of :mod:`gencore.ops`: a group norm in the place of PyTorch's, and the U-Net of diffusion models."""

from gencore.nn.convert import unet_from_diffusers as unet_from_diffusers
from gencore.nn.group_norm import GroupNorm as GroupNorm
from gencore.nn.unet import UNet as UNet

__all__ = ["GroupNorm", "UNet", "unet_from_diffusers"]
