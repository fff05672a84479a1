"""The time step as a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore._torch import beside, hand_over, is_overridden
from gencore.arguments import integer

_LONGEST_PERIOD = 10000.0


def timestep_embedding(
    t: Tensor, size: int, *, frequency_shift: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sines, then cosines, of the time at ``size / 2`` frequencies from 1 down to about 1 / 10000.

    e[n, i] = sin(t[n] w_i), e[n, h + i] = cos(t[n] w_i), w_i = 10000^(-i / (h - frequency_shift)), h = size / 2.

    Args:
        t: (N,), of any integer or floating type.
        size: even, more than ``2 * frequency_shift``.
        frequency_shift: 1 gives the frequencies of Ho et al., whose last is 1 / 10000; 0 those of Vaswani et al.
        dtype: float32 or float64, of the arithmetic and of the result.

    Returns:
        (N, size).

    Raises:
        ValueError: an argument is not as above.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5; Ho et al., "Denoising Diffusion
    Probabilistic Models" (2020), appendix B and its code.
    """
    if is_overridden(t):
        options = {"frequency_shift": frequency_shift, "dtype": dtype}
        return hand_over(timestep_embedding, (t,), t, size, **options)
    if t.dim() != 1:
        raise ValueError(f"t must have the shape (N,), got {tuple(t.shape)}")
    size = _check_sizes(size, frequency_shift)
    half = size // 2
    exponents = torch.arange(half, dtype=dtype, device=t.device) * -math.log(_LONGEST_PERIOD)
    frequencies = beside(torch.exp(exponents / (half - frequency_shift)), t)
    angles = t.to(dtype)[:, None] * frequencies
    return torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)


class TimeEmbedding(nn.Module):
    """:func:`timestep_embedding`, then linear, SiLU, linear: (N,) -> (N, embedding_size).

    Args:
        size: of the sinusoidal embedding.
        embedding_size: of the result, and of the layer between.
        frequency_shift: as :func:`timestep_embedding` has it.

    Raises:
        ValueError: an argument is not as above, or ``embedding_size`` is below 1.
    """

    def __init__(self, size: int, embedding_size: int, *, frequency_shift: float = 1.0) -> None:
        super().__init__()
        size = _check_sizes(size, frequency_shift)
        embedding_size = integer("embedding_size", embedding_size, least=1)
        self.size = size
        self.frequency_shift = frequency_shift
        self.linear1 = nn.Linear(size, embedding_size)
        self.linear2 = nn.Linear(embedding_size, embedding_size)

    def forward(self, t: Tensor) -> Tensor:
        waves = _rounded_embedding(t, self.size, self.frequency_shift, self.linear1.weight)
        embedding: Tensor = self.linear2(F.silu(self.linear1(waves)))
        return embedding

    def extra_repr(self) -> str:
        return f"size={self.size}, frequency_shift={self.frequency_shift}"


@torch.fx.wrap
def _rounded_embedding(t: Tensor, size: int, frequency_shift: float, like: Tensor) -> Tensor:
    """The embedding in the dtype of a layer's weight."""
    # In half precision, neighbouring time steps would be one.
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    return timestep_embedding(t, size, frequency_shift=frequency_shift, dtype=exact).to(like.dtype)


def _check_sizes(size: int, frequency_shift: float) -> int:
    """The size as an int."""
    size = integer("size", size)
    if size < 2 or size % 2:
        raise ValueError(f"size must be even and at least 2, got {size}")
    if not 0 <= frequency_shift < size // 2:
        raise ValueError(
            f"frequency_shift must be at least 0 and less than size / 2 = {size // 2}, got {frequency_shift}"
        )
    return size
