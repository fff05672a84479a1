"""Uniform noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gencore.noise import Key
from gencore.ops._fill import define_filling, fill

_uniform_ = define_filling("uniform_")


def uniform(
    shape: Sequence[int],
    key: Key | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """Uniform noise: multiples of 2^-24 in [0, 1), the same bits everywhere.

    Arguments, errors and guarantees are those of :func:`gencore.ops.normal`. The half types hold the float32 values
    rounded to nearest, so that the largest become 1. Both ops read the same words: draw from different streams of a key
    for uniforms and normals that are independent.

    Source: Salmon et al. (2011) for the bits.
    """
    return fill(uniform, _uniform_, shape, key, dtype=dtype, device=device, memory_format=memory_format, out=out)
