"""Kernels that Triton compiles for a GPU when they are first called, or interprets on the CPU if the environment
variable TRITON_INTERPRET is 1 before this is imported. Importing this imports triton.

The ops have the names that the library knows them by."""

from gencore.backends.triton._group_norm_second import group_norm_double_backward, group_norm_jvp
from gencore.backends.triton.add_noise import add_noise
from gencore.backends.triton.attention import attention, attention_backward
from gencore.backends.triton.denoising_loss import denoising_loss, denoising_loss_backward
from gencore.backends.triton.diffusion_step import diffusion_step
from gencore.backends.triton.group_norm import group_norm, group_norm_backward
from gencore.backends.triton.normal import normal_
from gencore.backends.triton.reparameterize import (
    reparameterize,
    reparameterize_and_slope,
    reparameterize_backward,
    reparameterize_kl,
)
from gencore.backends.triton.uniform import uniform_

__all__ = [
    "add_noise",
    "attention",
    "attention_backward",
    "denoising_loss",
    "denoising_loss_backward",
    "diffusion_step",
    "group_norm",
    "group_norm_backward",
    "group_norm_double_backward",
    "group_norm_jvp",
    "normal_",
    "reparameterize",
    "reparameterize_and_slope",
    "reparameterize_backward",
    "reparameterize_kl",
    "uniform_",
]
