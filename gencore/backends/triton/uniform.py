"""Uniform noise."""

from __future__ import annotations

from torch import Tensor

from gencore.backends.triton._fill import fill


def uniform_(out: Tensor, key: Tensor) -> None:
    fill(out, key, uniform=True)
