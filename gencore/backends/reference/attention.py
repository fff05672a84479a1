"""Definition of :func:`gencore.ops.attention` and :func:`gencore.ops.spatial_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, and the logarithm of the softmax's denominator."""
    logits = (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * (q @ k.transpose(-1, -2))
    lse = torch.logsumexp(logits, -1)
    return torch.softmax(logits, -1) @ v, lse


def spatial_attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Attention among the pixels of each sample; the channels are those of q, of k and of v, each head after head."""
    q, k, v = qkv.flatten(2).unflatten(1, (3, num_heads, -1)).transpose(-1, -2).unbind(1)
    out, _ = attention(q, k, v, scale)
    return out.transpose(-1, -2).reshape(qkv.shape[0], -1, *qkv.shape[2:])
