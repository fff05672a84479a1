"""Ops that are on their way, by PyTorch's operations: what :mod:`gencore.ops` will offer under the same names."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bias_act(x: Tensor, bias: Tensor | None, activation: str, *, slope: float = 0.2, gain: float = 1.0) -> Tensor:
    """gain * act(x + bias[c]) for x (N, C, ...)."""
    if bias is not None:
        x = x + bias.reshape(-1, *[1] * (x.dim() - 2))
    functions = {"linear": lambda x: x, "relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, slope)}
    y: Tensor = functions.get(activation, getattr(F, activation, None))(x)  # type: ignore[misc]
    return y if gain == 1 else y * gain
