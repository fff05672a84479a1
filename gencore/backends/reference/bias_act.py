"""Definition of :func:`gencore.ops.bias_act` and of its derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gencore.backends.activations import SELU_SCALE, SELU_SLOPE

_Function = Callable[[Tensor, float], Tensor]


class Row(NamedTuple):
    """An activation, of an argument and the slope that leaky_relu takes, with its derivatives."""

    value: _Function
    first: _Function
    second: _Function


def _zero(t: Tensor, slope: float) -> Tensor:
    return torch.zeros_like(t)


def _steps(positive: float, t: Tensor, negative: float) -> Tensor:
    # Numbers alone would make float32 of them, whatever t is.
    return torch.full_like(t, negative).masked_fill(t > 0, positive)


def _density(t: Tensor) -> Tensor:
    return torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def _below(t: Tensor) -> Tensor:
    """The standard normal distribution function. PyTorch's own, special.ndtr, is 0 already at -8.4."""
    return torch.erfc(-t * math.sqrt(0.5)) / 2


def _bump(t: Tensor) -> Tensor:
    """The derivative of the sigmoid, which loses no digits at either end."""
    decay = torch.exp(-t.abs())
    return decay / (1 + decay).square()


def _elu(slope: float, scale: float) -> Row:
    def falling(t: Tensor) -> Tensor:
        return scale * slope * torch.exp(t.clamp(max=0))

    return Row(
        lambda t, _: scale * torch.where(t > 0, t, slope * torch.expm1(t.clamp(max=0))),
        lambda t, _: torch.where(t > 0, scale, falling(t)),
        lambda t, _: torch.where(t > 0, 0.0, falling(t)),
    )


def _silu_first(t: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1 + t * (1 - s))


def _silu_second(t: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(t)
    return s * (1 - s) * (2 + t * (1 - 2 * s))


ROWS = {
    "linear": Row(lambda t, _: t, lambda t, _: torch.ones_like(t), _zero),
    "relu": Row(lambda t, _: torch.relu(t), lambda t, _: _steps(1.0, t, 0.0), _zero),
    "leaky_relu": Row(lambda t, slope: F.leaky_relu(t, slope), lambda t, slope: _steps(1.0, t, slope), _zero),
    "tanh": Row(
        lambda t, _: torch.tanh(t),
        lambda t, _: 4 * _bump(2 * t),
        lambda t, _: -8 * torch.tanh(t) * _bump(2 * t),
    ),
    "sigmoid": Row(
        lambda t, _: torch.sigmoid(t), lambda t, _: _bump(t), lambda t, _: -torch.tanh(t / 2) * _bump(t)
    ),
    "elu": _elu(1.0, 1.0),
    "selu": _elu(SELU_SLOPE, SELU_SCALE),
    "softplus": Row(
        lambda t, _: torch.logaddexp(t, torch.zeros_like(t)), lambda t, _: torch.sigmoid(t), lambda t, _: _bump(t)
    ),
    "silu": Row(lambda t, _: t * torch.sigmoid(t), _silu_first, _silu_second),
    "gelu": Row(
        lambda t, _: t * _below(t),
        lambda t, _: _below(t) + t * _density(t),
        lambda t, _: _density(t) * (2 - t.square()),
    ),
}  # fmt: skip


def along_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.dim() - 2))


def argument(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + along_channels(bias, x)


def bias_act(x: Tensor, bias: Tensor | None, activation: str, slope: float, gain: float, clamp: float | None) -> Tensor:
    """y = min(max(gain act(x + bias), -clamp), clamp), whose derivative is 0 where y has reached the clamp."""
    y = gain * ROWS[activation].value(argument(x, bias), slope)
    return y if clamp is None else torch.where(y.abs() < clamp, y, y.detach().clamp(-clamp, clamp))


def derivative(
    order: int, x: Tensor, bias: Tensor | None, activation: str, slope: float, gain: float, clamp: float | None
) -> Tensor:
    """The first or second derivative of y by x, as ``order`` says."""
    row, t = ROWS[activation], argument(x, bias)
    result = gain * (row.first if order == 1 else row.second)(t, slope)
    if clamp is None:
        return result
    return torch.where((gain * row.value(t, slope)).abs() >= clamp, 0.0, result)


def derivative_at_output(y: Tensor, activation: str, slope: float, gain: float, clamp: float | None) -> Tensor:
    """The first derivative of a piecewise linear activation, from y, which has the sign of x + bias."""
    result = gain * ROWS[activation].first(y, slope)
    return result if clamp is None else torch.where(y.abs() >= clamp, 0.0, result)
