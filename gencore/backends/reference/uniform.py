"""Definition of :func:`gencore.ops.uniform`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gencore.noise import Key, reference_uniform


def uniform(shape: Sequence[int], key: Key, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float32 values of :func:`gencore.noise.reference_uniform`, rounded to ``dtype``."""
    return torch.from_numpy(reference_uniform(shape, key)).to(dtype)
