"""Definition of :func:`gencore.ops.add_noise`."""

from __future__ import annotations

from torch import Tensor


def add_noise(x0: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps; ``rows``, one or one per sample, have the columns alpha and sigma."""
    alpha, sigma = rows.to(x0.dtype).reshape(-1, 2, *[1] * (x0.dim() - 1)).unbind(1)
    return alpha * x0 + sigma * noise
