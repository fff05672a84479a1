"""Uniform noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gencore._torch import is_wrapped
from gencore.noise import Key
from gencore.ops._fill import define_filling, empty_beside, fill

_uniform_ = define_filling("uniform_")


def uniforms_for(x: Tensor, key: Tensor, shape: Sequence[int]) -> Tensor:
    """What :func:`uniform` draws for a key's words, float32 where ``x`` is, mapped over where the key is."""
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if torch.compiler.is_compiling() or is_wrapped(key):
        out = empty_beside(key, shape, out, torch.contiguous_format)
    _uniform_(out, key)
    return out


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
