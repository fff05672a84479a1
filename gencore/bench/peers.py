"""What our ops are held against: the same mathematics as users of PyTorch run it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore.bench import plain


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function through torch.compile, for the shapes it is called with."""
    return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)


def eager_and_compiled(function: Callable[..., Any], device: str = "cpu") -> dict[str, Callable[..., Any]]:
    """A PyTorch function as its users run it: eager, compiled, and on the CPU also compiled with eager's generator.

    There the compiler's own generator is slow enough to have nobody use it; on GPUs it is the fast one.
    """
    peers = {"eager": function, "compile": compiled(function)}
    return peers | ({"compile, fallback RNG": compiled(function, fallback_random=True)} if device == "cpu" else {})


def liger_group_norm(groups: int, device: str) -> dict[str, Callable[..., Tensor]]:
    """Liger-Kernel's group norm, with PyTorch's SiLU behind it, on a GPU where the package is installed."""
    if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction

    def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(function.apply(x, weight, bias, x.shape[1], groups, 1e-5))

    return {"Liger-Kernel": liger}


def attention_packages(dtype: torch.dtype, device: str) -> dict[str, Callable[..., Tensor]]:
    """Attention of the packages for it that are installed, on a GPU, of (B, heads, tokens, size) like PyTorch's.

    Theirs take, and give, the tokens before the heads: views of what we have, which for tokens are how they lie.
    """
    found: dict[str, Callable[..., Tensor]] = {}
    if device != "cuda":
        return found
    if importlib.util.find_spec("xformers") is not None:
        xformers = importlib.import_module("xformers.ops")
        found["xformers"] = _with_tokens_first(xformers.memory_efficient_attention)
    if dtype in (torch.float16, torch.bfloat16) and importlib.util.find_spec("flash_attn") is not None:
        found["flash-attn"] = _with_tokens_first(importlib.import_module("flash_attn").flash_attn_func)
    return found


def _with_tokens_first(attend: Callable[..., Any]) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return attention


def diffusers_scheduler(name: str, device: str, steps: int | None = None, **options: Any) -> Any:
    """diffusers' scheduler of that name with its default betas, those of DDPM; None where it is not installed."""
    try:
        import diffusers
    except ImportError:
        return None
    scheduler = getattr(diffusers, name)(**options)
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
        projected: Tensor = self.out(plain.spatial_attention(self.qkv(self.norm(x)), self.num_heads))
        return x + projected
