"""Definition of :func:`gencore.ops.add_noise`."""

from __future__ import annotations

from torch import Tensor


def add_noise(x0: Tensor, table: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps; ``table`` has the columns alpha and sigma, ``t`` numbers its rows."""
    alpha, sigma = table[t].to(x0.dtype).reshape(-1, 2, *[1] * (x0.dim() - 1)).unbind(1)
    return alpha * x0 + sigma * noise
