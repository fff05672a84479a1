"""Standard normal noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gencore._torch import is_wrapped
from gencore.noise import Key
from gencore.ops._fill import define_filling, empty_beside, fill

_normal_ = define_filling("normal_")


def fill_with_normals(out: Tensor, key: Tensor) -> Tensor:
    """Fills ``out`` with the noise that :func:`normal` draws, for a key's words."""
    _normal_(out, key)
    return out


def normals_for(x: Tensor, key: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """The noise of a key's words, for arithmetic with ``x``: float32, or float64, mapped over where the key is."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=kind, device=x.device)
    if torch.compiler.is_compiling() or is_wrapped(key):
        return fill_with_normals(empty_beside(key, shape, like, memory_format), key)
    return fill_with_normals(torch.empty(shape, dtype=kind, device=x.device, memory_format=memory_format), key)


def normal(
    shape: Sequence[int],
    key: Key | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise whose every value depends on (seed, sample id, stream, element index) alone.

    The bits are the same on every device, for any SIMD level, number of threads, split of the batch and memory
    format; :mod:`gencore.noise` defines them. The values reach 6.76; float64 holds the float32 values, the half
    types hold them rounded.

    Args:
        shape: (samples, ...); the first dimension numbers the samples, the others count one sample's elements in C
            order, at most 2^34 of them.
        key: what the noise depends on; by default one drawn from torch's generator.
        dtype: float32, bfloat16, float16 or float64; by default torch's default dtype.
        device: the CPU or a GPU; by default torch's default device.
        memory_format: of the result; channels_last for four dimensions, channels_last_3d for five.
        out: a tensor of ``shape`` to write to instead of a new one, with any strides.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which, and nothing is written.

    >>> whole = normal((64, 3, 32, 32), Key(0))
    >>> part = normal((8, 3, 32, 32), Key(0).samples(16))
    >>> torch.equal(whole[16:24], part)
    True

    Source: Salmon et al. (2011) for the bits, Box and Muller (1958) for the transform.
    """
    return fill(normal, _normal_, shape, key, dtype=dtype, device=device, memory_format=memory_format, out=out)
