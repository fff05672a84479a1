"""Modules on top of :mod:`gencore.ops`: a group norm in the place of PyTorch's, attention of an image's pixels, the
U-Net of diffusion models, and the layers of GANs."""

from gencore.nn.attention import SpatialCrossAttention as SpatialCrossAttention
from gencore.nn.attention import SpatialSelfAttention as SpatialSelfAttention
from gencore.nn.conditional_norm import ConditionalBatchNorm2d as ConditionalBatchNorm2d
from gencore.nn.convert import attention_from_diffusers as attention_from_diffusers
from gencore.nn.convert import unet_from_diffusers as unet_from_diffusers
from gencore.nn.dropout import Dropout as Dropout
from gencore.nn.group_norm import GroupNorm as GroupNorm
from gencore.nn.spectral_norm import spectral_norm as spectral_norm
from gencore.nn.unet import UNet as UNet

__all__ = [
    "ConditionalBatchNorm2d",
    "Dropout",
    "GroupNorm",
    "SpatialCrossAttention",
    "SpatialSelfAttention",
    "UNet",
    "attention_from_diffusers",
    "spectral_norm",
    "unet_from_diffusers",
]
