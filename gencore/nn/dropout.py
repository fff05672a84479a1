"""Dropout whose mask is a pure function of a key."""

from __future__ import annotations

from torch import Tensor, nn

from gencore import ops
from gencore.noise import Key


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014): in training, values are 0 with probability ``p``, and others divided by 1 - p.

    With a key, which values is a pure function of it: sample ``i`` of a batch uses the noise of ``key.samples(i)``, so
    that it is the same for any batch split, number of processes and memory format. Without, torch's generator says.

    Args:
        p: at least 0 and less than 1.
        stream: of the key; modules that are given the same key have different ones.
    """

    def __init__(self, p: float = 0.5, stream: int = 0) -> None:
        super().__init__(p)
        self.stream = stream

    def forward(self, input: Tensor, key: Key | None = None) -> Tensor:
        """(N, ...) -> (N, ...)."""
        if key is None or not self.training or self.p == 0:
            return super().forward(input)
        kept = ops.uniform(input.shape, key.stream(self.stream), device=input.device) >= self.p
        return input * kept / (1 - self.p)
