"""The normalization of a hidden layer, of whichever kind is asked for."""

from __future__ import annotations

from torch import Tensor, nn

from gencore.models.gan.config import NormKind
from gencore.nn import ConditionalBatchNorm2d, GroupNorm


class Norm(nn.Module):
    """(B, channels, ...) and labels (B,) -> the same shape, normalized.

    ``batch`` makes images depend on those that they are made with, in training; ``layer`` and ``none`` do not.

    Args:
        kind: which.
        channels: of the input.
        is_flat: whether the input is (B, channels), of no pixels.
        num_classes: whose scale and shift a batch norm of pixels has, one of each class; 0: the same for all.
    """

    def __init__(self, kind: NormKind, channels: int, *, is_flat: bool = False, num_classes: int = 0):
        super().__init__()
        self.norm: nn.Module | None = None
        self.is_conditional = kind == "batch" and num_classes > 0 and not is_flat
        if self.is_conditional:
            self.norm = ConditionalBatchNorm2d(channels, num_classes)
        elif kind == "batch":
            self.norm = nn.BatchNorm1d(channels) if is_flat else nn.BatchNorm2d(channels)
        elif kind == "layer":
            self.norm = nn.LayerNorm(channels) if is_flat else GroupNorm(1, channels)

    @property
    def has_bias(self) -> bool:
        """Whether the layer before needs no bias, as this one has it."""
        return self.norm is not None

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.norm is None:
            return hidden
        output: Tensor = self.norm(hidden, labels) if self.is_conditional else self.norm(hidden)
        return output
