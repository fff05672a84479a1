"""Attention of the pixels of an image, to each other or to a context such as a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gencore import ops
from gencore.arguments import integer
from gencore.nn.group_norm import GroupNorm
from gencore.nn.pointwise import PointwiseLinear
from gencore.nn.residual import zeroed


class SpatialSelfAttention(nn.Module):
    """x + out(attention(q, k, v)), where q, k, v = qkv(norm(x)) of each pixel; see :func:`gencore.ops.attention`.

    ``out`` begins as zero, so that at first the block is the identity.

    Args:
        channels: a multiple of ``num_groups`` and ``num_heads``.
        num_heads: heads of ``channels / num_heads`` channels each.
        num_groups, eps: of the norm.

    Raises:
        ValueError: ``channels`` is no multiple of ``num_groups`` or ``num_heads``.

    >>> block = SpatialSelfAttention(64, num_heads=4)
    >>> block(torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; in a U-Net, Ho et al. (2020), appendix B.
    """

    def __init__(self, channels: int, *, num_heads: int = 1, num_groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        channels, self.num_heads = _check_heads(channels, num_heads)
        self.norm = GroupNorm(num_groups, channels, eps)
        self.qkv = PointwiseLinear(channels, 3 * channels)
        self.out = zeroed(PointwiseLinear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), or with any spatial dimensions -> the same shape and memory format; nothing is permuted."""
        mixed = ops.spatial_attention(self.qkv(self.norm(x)), self.num_heads)
        output: Tensor = x + self.out(mixed)
        return output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class SpatialCrossAttention(nn.Module):
    """x + out(attention(q(norm(x)), k, v)), where k, v = kv(context) of each of the context's tokens.

    ``out`` begins as zero, so that at first the block is the identity.

    Args:
        channels: a multiple of ``num_groups`` and ``num_heads``.
        context_channels: of the context's tokens, at least 1.
        num_heads: heads of ``channels / num_heads`` channels each.
        num_groups, eps: of the norm.

    Raises:
        ValueError: an argument is not as above.

    >>> block = SpatialCrossAttention(64, 768, num_heads=4)
    >>> block(torch.randn(2, 64, 8, 8), torch.randn(2, 77, 768)).shape
    torch.Size([2, 64, 8, 8])

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3.
    """

    def __init__(
        self, channels: int, context_channels: int, *, num_heads: int = 1, num_groups: int = 32, eps: float = 1e-5
    ) -> None:
        super().__init__()
        channels, self.num_heads = _check_heads(channels, num_heads)
        context_channels = integer("context_channels", context_channels, least=1)
        self.norm = GroupNorm(num_groups, channels, eps)
        self.q = PointwiseLinear(channels, channels)
        self.kv = nn.Linear(context_channels, 2 * channels)
        self.out = zeroed(PointwiseLinear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (N, C, H, W), or with any spatial dimensions, context (N, S, context_channels) -> x's shape and format.

        Raises:
            TypeError, ValueError: ``context`` is no tensor of the shape above.
        """
        _check_context(context, x, self.kv.in_features)
        heads = self.q(self.norm(x)).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        k, v = self.kv(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # In memory the result has its dimensions in the order of the query's, so that this is a view in either format.
        mixed = ops.attention(heads, k, v).transpose(2, 3).flatten(1, 2)
        output: Tensor = x + self.out(mixed.unflatten(2, x.shape[2:]))
        return output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


@torch.fx.wrap
def _check_context(context: Tensor, x: Tensor, channels: int) -> None:
    if not isinstance(context, Tensor):
        raise TypeError(f"context must be a tensor, got {type(context).__name__}")
    if context.dim() != 3 or context.shape[0] != x.shape[0] or context.shape[2] != channels:
        raise ValueError(f"context must have the shape ({x.shape[0]}, tokens, {channels}), got {tuple(context.shape)}")


def _check_heads(channels: int, num_heads: int) -> tuple[int, int]:
    """Both as ints."""
    channels, num_heads = integer("channels", channels), integer("num_heads", num_heads)
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}")
    return channels, num_heads
