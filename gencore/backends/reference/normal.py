"""Definition of :func:`gencore.ops.normal`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gencore.noise import Key, reference_normal


def normal(shape: Sequence[int], key: Key, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float32 values of :func:`gencore.noise.reference_normal`, rounded to ``dtype``."""
    return torch.from_numpy(reference_normal(shape, key)).to(dtype)
