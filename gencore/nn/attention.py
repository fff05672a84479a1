"""Self-attention among the pixels of an image."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gencore.nn.group_norm import GroupNorm
from gencore.nn.residual import zeroed


class SelfAttention(nn.Module):
    """x + out(softmax(q k^T / sqrt(head size)) v), per head, where q, k, v = qkv(norm(x)) of each pixel.

    ``out`` begins as zero, so that at first the block is the identity.

    Args:
        channels: a multiple of ``num_groups`` and ``num_heads``.
        num_heads: heads of ``channels / num_heads`` channels each.
        num_groups, eps: of the norm.

    Raises:
        ValueError: ``channels`` is no multiple of ``num_heads``.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; in a U-Net, Ho et al. (2020), appendix B.
    """

    def __init__(self, channels: int, *, num_heads: int = 1, num_groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}")
        self.num_heads = num_heads
        self.norm = GroupNorm(num_groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        # (N, H W, C) without gaps, a copy only if x is not channels_last: PyTorch's fused attention wants the channels
        # of a head next to each other, and the pixels of q, k and v may then be as far apart as they like.
        pixels = self.norm(x).flatten(2).transpose(1, 2).contiguous()
        qkv = self.qkv(pixels).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return x + output.transpose(1, 2).unflatten(2, x.shape[-2:])

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
