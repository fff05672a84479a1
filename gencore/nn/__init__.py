"""Modules on top of :mod:`gencore.ops`: a group norm in the place of PyTorch's, attention of an image's pixels, and the
U-Net of diffusion models."""

from gencore.nn.attention import SpatialCrossAttention as SpatialCrossAttention
from gencore.nn.attention import SpatialSelfAttention as SpatialSelfAttention
from gencore.nn.convert import attention_from_diffusers as attention_from_diffusers
from gencore.nn.convert import unet_from_diffusers as unet_from_diffusers
from gencore.nn.dropout import Dropout as Dropout
from gencore.nn.group_norm import GroupNorm as GroupNorm
from gencore.nn.unet import UNet as UNet

__all__ = [
    "Dropout",
    "GroupNorm",
    "SpatialCrossAttention",
    "SpatialSelfAttention",
    "UNet",
    "attention_from_diffusers",
    "unet_from_diffusers",
]
