"""What our ops are held against: the same mathematics as users of PyTorch run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function through torch.compile, for the shapes it is called with."""
    return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)


def eager_and_compiled(function: Callable[..., Any], device: str = "cpu") -> dict[str, Callable[..., Any]]:
    """A PyTorch function as its users run it: eager, compiled, and on the CPU also compiled with eager's generator.

    There the compiler's own generator is slow enough to have nobody use it; on GPUs it is the fast one.
    """
    peers = {"eager": function, "compile": compiled(function)}
    return peers | ({"compile, fallback RNG": compiled(function, fallback_random=True)} if device == "cpu" else {})


def diffusers_scheduler(name: str, device: str, steps: int | None = None) -> Any:
    """diffusers' scheduler of that name with its default betas, those of DDPM; None where it is not installed."""
    try:
        import diffusers
    except ImportError:
        return None
    scheduler = getattr(diffusers, name)()
    if steps is not None:
        scheduler.set_timesteps(steps, device=device)
    return scheduler


def spatial_attention(qkv: Tensor, num_heads: int, copies: bool = False) -> Tensor:
    """PyTorch's attention among the pixels of (N, 3C, H, W), as it is used there: views into heads and out of them.

    ``copies``: heads are made dense first, for kernels that are slow, or missing, where the channels are far apart.
    """
    samples, channels, height, width = qkv.shape
    heads = qkv.flatten(2).unflatten(1, (3, num_heads, -1)).transpose(-1, -2)
    q, k, v = (heads.contiguous() if copies else heads).unbind(1)
    out = F.scaled_dot_product_attention(q, k, v)
    if qkv.is_contiguous(memory_format=torch.channels_last):
        pixels = out.transpose(1, 2).reshape(samples, height, width, channels // 3)
        return pixels.permute(0, 3, 1, 2)
    return out.transpose(-1, -2).reshape(samples, channels // 3, height, width)


class AttentionBlock(torch.nn.Module):
    """The attention block of diffusion U-Nets in plain PyTorch: norm, q, k and v, attention, projection, residual."""

    def __init__(self, channels: int, num_heads: int, num_groups: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = torch.nn.GroupNorm(num_groups, channels)
        self.qkv = torch.nn.Conv2d(channels, 3 * channels, 1)
        self.out = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.out(spatial_attention(self.qkv(self.norm(x)), self.num_heads))
        return x + projected
