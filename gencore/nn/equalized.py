"""Layers with an equalized learning rate: weights of unit variance, scaled when they are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import ops
from gencore.arguments import integer
from gencore.nn._checks import check_features, check_images, number, odd
from gencore.nn._convolution import BINOMIAL, check_factors, convolution, filter_of
from gencore.ops.bias_act import Activation

# He's gain, by which these keep the variance.
_HE = {"relu": math.sqrt(2), "leaky_relu": math.sqrt(2)}


class _Equalized(nn.Module):
    """A weight and a bias that are scaled when they are used, and the activation behind them."""

    def __init__(
        self,
        shape: Sequence[int],
        bias: bool,
        activation: Activation,
        gain: float | None,
        lr_multiplier: float,
        bias_init: float,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
        self.activation = activation
        self.gain = _HE.get(activation, 1.0) if gain is None else number("gain", gain)
        self.lr_multiplier = number("lr_multiplier", lr_multiplier, above=0)
        self.bias_init = number("bias_init", bias_init)
        self.weight_scale = self.lr_multiplier / math.sqrt(math.prod(shape[1:]))
        self.weight = nn.Parameter(torch.empty(*shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of the standard normal divided by ``lr_multiplier``, a bias that is used as ``bias_init``."""
        nn.init.normal_(self.weight, std=1 / self.lr_multiplier)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_init / self.lr_multiplier)

    def _weight_for(self, x: Tensor) -> Tensor:
        return (self.weight * self.weight_scale).to(x.dtype)

    def _activated(self, x: Tensor) -> Tensor:
        if self.bias is None and self.activation == "linear" and self.gain == 1:
            return x
        # The op adds a float32 bias to images in half precision as it is.
        kind = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(kind) * self.lr_multiplier
        return ops.bias_act(x, bias, self.activation, gain=self.gain)

    def _options(self) -> str:
        told = [] if self.bias is not None else ["bias=False"]
        told += [] if self.activation == "linear" else [f"activation={self.activation!r}"]
        told += [] if self.lr_multiplier == 1 else [f"lr_multiplier={self.lr_multiplier:g}"]
        return "".join(f", {each}" for each in told)


class EqualizedLinear(_Equalized):
    """A linear layer with an equalized learning rate, and the activation behind it.

    y = gain * act(x (c W)^T + m b), with c = m / sqrt(in_features) and m = lr_multiplier. The parameters W start as
    standard normal values divided by m, so that all layers have updates of the same relative size under Adam, and those
    with m < 1 have smaller ones.

    Inputs in half precision may meet float32 parameters, as under autocast: those are scaled, then rounded.

    Args:
        in_features, out_features: the sizes.
        bias: whether there is one.
        activation: "linear" for none, or one that :func:`gencore.ops.bias_act` knows; leaky_relu has the slope 0.2.
        gain: of the result; left out, sqrt(2) for relu and leaky_relu, by which they keep the variance, else 1.
        lr_multiplier: of both parameters; above 0.
        bias_init: what the bias is at first.

    Raises:
        TypeError, ValueError: an argument is not as above.

    >>> EqualizedLinear(64, 128, activation="leaky_relu")(torch.randn(4, 64)).shape
    torch.Size([4, 128])

    Source: Karras et al., "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (2018),
    section 4.1; the multiplier is that of StyleGAN's mapping network (Karras et al. 2019, appendix C).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: Activation = "linear",
        gain: float | None = None,
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        shape = (integer("out_features", out_features, least=1), integer("in_features", in_features, least=1))
        super().__init__(shape, bias, activation, gain, lr_multiplier, bias_init)
        self.out_features, self.in_features = shape

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        check_features("input", input, self.in_features)
        y = F.linear(input, self._weight_for(input))
        return self._activated(y.reshape(-1, self.out_features)).reshape(y.shape)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}{self._options()}"


class EqualizedConv2d(_Equalized):
    """A convolution with an equalized learning rate, that may resample, and the activation behind it.

    y = gain * act(down(f * (c W) * up(x)) + m b), with c = m / sqrt(in_channels k k) and m = lr_multiplier: see
    :class:`EqualizedLinear`. Zeros are around the image, so that its size stays, or is multiplied by ``up`` or divided
    by ``down``. The filter f is there where something is resampled; its weights are scaled to the sum 1.

    Args:
        in_channels, out_channels: the channels.
        kernel_size: odd.
        bias, activation, gain, lr_multiplier, bias_init: as of :class:`EqualizedLinear`.
        up, down: the factors, of which at most one is not 1.
        filter: the weights of the separable filter.

    Raises:
        TypeError, ValueError: an argument is not as above.

    >>> EqualizedConv2d(8, 16, 3, down=2, activation="leaky_relu")(torch.randn(4, 8, 32, 32)).shape
    torch.Size([4, 16, 16, 16])

    Source: as of :class:`EqualizedLinear`; resampling is that of Karras et al. (2020), appendix B.
    """

    filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        up: int = 1,
        down: int = 1,
        filter: Sequence[float] = BINOMIAL,
        activation: Activation = "linear",
        gain: float | None = None,
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        channels = integer("out_channels", out_channels, least=1), integer("in_channels", in_channels, least=1)
        size = odd("kernel_size", kernel_size)
        factors, weights = check_factors(up, down), filter_of(filter)
        super().__init__((*channels, size, size), bias, activation, gain, lr_multiplier, bias_init)
        self.out_channels, self.in_channels, self.kernel_size = *channels, size
        self.up, self.down = factors
        self.register_buffer("filter", weights, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H up // down, W up // down)."""
        check_images("input", input, self.in_channels)
        y = convolution(input, self._weight_for(input), self.filter, up=self.up, down=self.down)
        return self._activated(y)

    def extra_repr(self) -> str:
        resampled = "".join(f", {name}={factor}" for name in ("up", "down") if (factor := getattr(self, name)) > 1)
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}{resampled}{self._options()}"
