"""Kernels that Triton compiles for a GPU when they are first called, or interprets on the CPU if the environment
variable TRITON_INTERPRET is 1 before this is imported. Importing this imports triton.

The ops have the names that the library knows them by."""

from gencore.backends.triton.add_noise import add_noise
from gencore.backends.triton.attention import (
    attention,
    attention_backward,
    attention_double_backward,
    attention_jvp,
)
from gencore.backends.triton.denoising_loss import denoising_loss, denoising_loss_backward
from gencore.backends.triton.diffusion_step import diffusion_step
from gencore.backends.triton.general_attention import general_attention, general_attention_backward
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
    "attention_double_backward",
    "attention_jvp",
    "denoising_loss",
    "denoising_loss_backward",
    "diffusion_step",
    "general_attention",
    "general_attention_backward",
    "group_norm",
    "group_norm_backward",
    "normal_",
    "reparameterize",
    "reparameterize_and_slope",
    "reparameterize_backward",
    "reparameterize_kl",
    "uniform_",
]
