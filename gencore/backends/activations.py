"""The table of activations for Python: csrc/include/gencore/activations.h has the same rows."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Activation = Literal[
    "linear", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "softplus", "silu", "gelu"
]  # fmt: skip
# As the kernels know them.
NUMBERS: dict[str | None, int] = {
    None: 0, "linear": 0, "silu": 1, "relu": 2, "leaky_relu": 3, "tanh": 4, "sigmoid": 5, "elu": 6, "selu": 7,
    "softplus": 8, "gelu": 9,
}  # fmt: skip
# Klambauer et al., "Self-Normalizing Neural Networks" (2017), equation 14.
SELU_SCALE, SELU_SLOPE = 1.0507009873554804934, 1.6732632423543772848


class Form(NamedTuple):
    """What makes an activation of a function: y = min(max(factor f(t), lower), upper)."""

    function: str
    slope: float
    factor: float
    lower: float
    upper: float


def form_of(activation: str, slope: float, gain: float, clamp: float | None) -> Form:
    """``slope`` is that of leaky_relu."""
    most = math.inf if clamp is None else clamp
    if activation == "relu":
        # The half of the identity that is positive before the gain.
        return Form("piecewise_linear", 1.0, gain, *((0.0, most) if gain > 0 else (-most, 0.0)))
    if activation in ("linear", "leaky_relu"):
        return Form("piecewise_linear", 1.0 if activation == "linear" else slope, gain, -most, most)
    if activation in ("elu", "selu"):
        own, scale = (SELU_SLOPE, SELU_SCALE) if activation == "selu" else (1.0, 1.0)
        return Form("elu", own, gain * scale, -most, most)
    return Form(activation, 0.0, gain, -most, most)


def is_piecewise_linear(activation: str) -> bool:
    return activation in ("linear", "relu", "leaky_relu")


def output_tells(activation: str, slope: float, gain: float) -> bool:
    """Whether the derivative follows from y, so that x need not be kept: y then has the sign of x + bias."""
    return is_piecewise_linear(activation) and gain > 0 and slope >= 0
