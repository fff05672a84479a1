"""The kernels: functions of tensors, each one pass over memory, each a ``torch.library`` op."""

from gencore.backends.choice import backend as backend
from gencore.backends.choice import handed_to as handed_to
from gencore.ops._checks import is_served as is_served
from gencore.ops._explain import explain as explain
from gencore.ops._library import register_rules
from gencore.ops.add_noise import add_noise as add_noise
from gencore.ops.attention import attention as attention
from gencore.ops.attention import spatial_attention as spatial_attention
from gencore.ops.bias_act import bias_act as bias_act
from gencore.ops.denoising_loss import denoising_loss as denoising_loss
from gencore.ops.denoising_loss import variational_bound as variational_bound
from gencore.ops.diffusion_step import STEP_COLUMNS as STEP_COLUMNS
from gencore.ops.diffusion_step import diffusion_step as diffusion_step
from gencore.ops.diffusion_step import step_coefficients as step_coefficients
from gencore.ops.group_norm import group_norm as group_norm
from gencore.ops.normal import normal as normal
from gencore.ops.reparameterize import reparameterize as reparameterize
from gencore.ops.reparameterize import reparameterize_kl as reparameterize_kl
from gencore.ops.uniform import uniform as uniform
from gencore.ops.upfirdn2d import downsample2d as downsample2d
from gencore.ops.upfirdn2d import filter2d as filter2d
from gencore.ops.upfirdn2d import upfirdn2d as upfirdn2d
from gencore.ops.upfirdn2d import upsample2d as upsample2d

register_rules()

__all__ = [
    "STEP_COLUMNS",
    "add_noise",
    "attention",
    "bias_act",
    "denoising_loss",
    "diffusion_step",
    "downsample2d",
    "filter2d",
    "group_norm",
    "normal",
    "reparameterize",
    "reparameterize_kl",
    "spatial_attention",
    "step_coefficients",
    "uniform",
    "upfirdn2d",
    "upsample2d",
    "variational_bound",
]
