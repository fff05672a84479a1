"""Convolution whose kernel is scaled by a style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gencore.arguments import integer
from gencore.nn._checks import check_features, check_images, odd
from gencore.nn._convolution import BINOMIAL, check_factors, convolution, filter_of
from gencore.nn._precision import widened, without_autocast
from gencore.nn.equalized import EqualizedLinear

Scaled = Literal["activations", "weights"]

_EPS = 1e-8


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by a style, and whose result has unit variance by expectation.

    For each image, with the style's scales s = affine(style) and w the weights with an equalized learning rate::

        w'[j, i, k] = s[i] w[j, i, k]                             (equation 1, modulation)
        w''[j, i, k] = w'[j, i, k] / sqrt(sum_ik w'^2 + eps)      (equations 2 and 3, demodulation)

    There are two ways to compute it. With scaled activations, x s is convolved with w, and the result divided by the
    root: nothing has the size of a kernel for each image. With scaled weights, the images are the groups of one grouped
    convolution with w''. Results are the same up to rounding, and so are derivatives.

    The root is in float32 at least. Equation 3 does not change if s or the weights of an output are multiplied by a
    number; both are divided by their largest magnitude first, and w by sqrt(in_channels k k), so that nothing leaves
    the range of float16. Without demodulation, s and w are as they are.

    Args:
        in_channels, out_channels: the channels.
        kernel_size: odd.
        style_size: of the style.
        up, down: factors of resampling, of which at most one is not 1; with the filter as :class:`EqualizedConv2d`.
        demodulate: whether equation 3 is used; the layer that makes colours goes without.
        filter: the weights of the separable filter.
        scaled: which way to compute; "activations" is the faster one, see docs/gan_layers.md.

    Raises:
        TypeError, ValueError: an argument is not as above.

    A style of zeros gives zeros. No image depends on others of its batch.

    >>> layer = ModulatedConv2d(8, 16, 3, style_size=32, up=2)
    >>> layer(torch.randn(4, 8, 16, 16), torch.randn(4, 32)).shape
    torch.Size([4, 16, 32, 32])

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020), section 2.2, equations 1 to
    3; what keeps float16 in range, Karras et al., "Training Generative Adversarial Networks with Limited Data" (2020),
    appendix D.
    """

    filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_size: int,
        *,
        up: int = 1,
        down: int = 1,
        demodulate: bool = True,
        filter: Sequence[float] = BINOMIAL,
        scaled: Scaled = "activations",
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, least=1)
        self.out_channels = integer("out_channels", out_channels, least=1)
        self.kernel_size = odd("kernel_size", kernel_size)
        self.style_size = integer("style_size", style_size, least=1)
        self.up, self.down = check_factors(up, down)
        if scaled not in get_args(Scaled):
            raise ValueError(f'scaled must be "activations" or "weights", got {scaled!r}')
        self.demodulate, self.scaled = demodulate, scaled
        self.register_buffer("filter", filter_of(filter), persistent=False)
        # Scales start around 1: a bias of 1.
        self.affine = EqualizedLinear(style_size, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.weight_scale = 1 / math.sqrt(self.weight[0].numel())
        nn.init.normal_(self.weight)

    def reset_parameters(self) -> None:
        """Weights of the standard normal, a style of scales around 1."""
        self.affine.reset_parameters()
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor, style: Tensor) -> Tensor:
        """input (N, in_channels, H, W), style (N, style_size) -> (N, out_channels, H up // down, W up // down)."""
        check_images("input", input, self.in_channels)
        check_features("style", style, self.style_size, input)
        with without_autocast(input):
            scales = self.affine(widened(style).to(self.affine.weight.dtype))
            weight, scales, factors = self._modulation(widened(self.weight), widened(scales))
        n, resampled = input.shape[0], {"up": self.up, "down": self.down}
        if self.scaled == "activations" or n == 0:
            x = input * scales.to(input.dtype)[:, :, None, None]
            y = convolution(x, weight.to(input.dtype), self.filter, **resampled)
            return y if factors is None else y * factors.to(y.dtype)[:, :, None, None]
        weights = weight * scales[:, None, :, None, None]
        if factors is not None:
            weights = weights * factors[:, :, None, None, None]
        weights = weights.to(input.dtype).flatten(0, 1)
        # The images become groups of channels of one.
        y = convolution(input.reshape(1, -1, *input.shape[2:]), weights, self.filter, groups=n, **resampled)
        return y.reshape(n, self.out_channels, *y.shape[2:])

    def _modulation(self, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weights, the scales of inputs (N, in_channels), and those of outputs (N, out_channels), None for 1."""
        weight = weight * self.weight_scale
        if not self.demodulate:
            return weight, scales, None
        # As constants: a factor that nothing depends on has no derivative.
        largest = weight.detach().abs().amax((1, 2, 3), keepdim=True)
        weight = weight * (self.weight_scale / largest.clamp(min=torch.finfo(weight.dtype).tiny))
        scales = scales / scales.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(scales.dtype).tiny)
        sums = scales.square() @ weight.square().sum((2, 3)).t()
        return weight, scales, torch.rsqrt(sums + _EPS)

    def extra_repr(self) -> str:
        told = "".join(f", {name}={factor}" for name in ("up", "down") if (factor := getattr(self, name)) > 1)
        told += "" if self.demodulate else ", demodulate=False"
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, style_size={self.style_size}{told}"
