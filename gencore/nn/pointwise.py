"""A linear layer on the channels of every pixel: a 1x1 convolution, by the way that is the fastest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore._torch import hand_over, is_overridden

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, C, ...), weight (D, C), bias (D,) -> (N, D, ...), in x's memory format and without a copy of x.

    Of a single channel, or of no samples, what comes back may be in either format.
    """
    if is_overridden(x):
        return hand_over(pointwise, (x,), x, weight, bias)
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    channels_first = x.flatten(2)
    if _HAS_ONEDNN and x.is_cpu and x.dtype == torch.float32 and x.numel():
        # oneDNN, which reads either format as it is, makes twice of what MKL's product of matrices does where MKL has
        # no code for the processor's own vectors. PyTorch gives it a convolution of few images on one thread only if
        # that is dilated; with one pixel there is nothing to dilate.
        y = F.conv2d(channels_first.unsqueeze(2), weight[:, :, None, None], bias, dilation=2).squeeze(2)
    elif (pixels := channels_first.transpose(1, 2)).is_contiguous():
        y = F.linear(pixels, weight, bias).transpose(1, 2)
    else:
        y = torch.baddbmm(bias.unsqueeze(1), weight.expand(x.shape[0], -1, -1), channels_first)
    return y.unflatten(2, x.shape[2:])


class PointwiseLinear(nn.Linear):
    """:class:`torch.nn.Linear` for images: (N, C, ...), of which it takes the channels of each pixel."""

    def forward(self, input: Tensor) -> Tensor:
        return pointwise(input, self.weight, self.bias)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution with the parameters of :class:`torch.nn.Conv2d`, as :func:`pointwise` computes it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return pointwise(input, _matrix(self.weight), self.bias)  # type: ignore[arg-type]


@torch.fx.wrap
def _matrix(weight: Tensor) -> Tensor:
    """The weight (D, C, 1, 1) as (D, C): a view whose gradient comes back in the weight's strides.

    Those of channels_last differ in the dimensions of one element only, which DistributedDataParallel compares too.
    """
    return weight.flatten(1) if weight.stride(3) == 1 else weight.permute(0, 2, 3, 1).flatten(0, 2)
