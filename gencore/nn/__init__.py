"""Modules on top of :mod:`gencore.ops`: a group norm in the place of PyTorch's, attention of an image's pixels, the
U-Net of diffusion models, and the layers of GANs."""

from gencore.nn.attention import SpatialCrossAttention as SpatialCrossAttention
from gencore.nn.attention import SpatialSelfAttention as SpatialSelfAttention
from gencore.nn.conditional_norm import ConditionalBatchNorm2d as ConditionalBatchNorm2d
from gencore.nn.convert import attention_from_diffusers as attention_from_diffusers
from gencore.nn.convert import unet_from_diffusers as unet_from_diffusers
from gencore.nn.dropout import Dropout as Dropout
from gencore.nn.equalized import EqualizedConv2d as EqualizedConv2d
from gencore.nn.equalized import EqualizedLinear as EqualizedLinear
from gencore.nn.group_norm import GroupNorm as GroupNorm
from gencore.nn.minibatch_std_dev import MinibatchStdDev as MinibatchStdDev
from gencore.nn.modulated import ModulatedConv2d as ModulatedConv2d
from gencore.nn.noise_injection import NoiseInjection as NoiseInjection
from gencore.nn.pixel_norm import PixelNorm as PixelNorm
from gencore.nn.spectral_norm import spectral_norm as spectral_norm
from gencore.nn.unet import UNet as UNet

__all__ = [
    "ConditionalBatchNorm2d",
    "Dropout",
    "EqualizedConv2d",
    "EqualizedLinear",
    "GroupNorm",
    "MinibatchStdDev",
    "ModulatedConv2d",
    "NoiseInjection",
    "PixelNorm",
    "SpatialCrossAttention",
    "SpatialSelfAttention",
    "UNet",
    "attention_from_diffusers",
    "spectral_norm",
    "unet_from_diffusers",
]
