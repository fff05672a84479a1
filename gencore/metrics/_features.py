"""What measures of two sets of features check before they compute."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_features(least: int, **sets: Tensor) -> list[Tensor]:
    """The sets as float64 on the CPU.

    Raises:
        TypeError: no tensor.
        ValueError: a set is not (N, D) with N at least ``least``, is not finite, or has another D than the first.
    """
    first, size = "", 0
    for name, features in sets.items():
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(features).__name__}")
        if features.dim() != 2 or len(features) < least:
            raise ValueError(f"{name} must be of shape (N, D) with N at least {least}, got {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} must be finite, but {int((~features.isfinite()).sum())} values are not")
        first, size = (first, size) if first else (name, features.shape[1])
        if features.shape[1] != size:
            raise ValueError(f"{name} must be of the size of {first}, {size}, got {features.shape[1]}")
    return [features.detach().to("cpu", torch.float64) for features in sets.values()]
