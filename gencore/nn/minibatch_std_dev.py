"""How much the images of a minibatch differ, as a feature of each of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore.arguments import integer
from gencore.nn._checks import check_channels
from gencore.nn._precision import widened

_EPS = 1e-8


class MinibatchStdDev(nn.Module):
    """Appends channels that say how much the images of a group differ, by which a discriminator sees a collapse.

    The standard deviation over the group's images, of every feature at every pixel, averaged over pixels and over the
    features of each of ``channels`` equal parts: a number per group and part, which fills a channel.

    The result depends on which images are in a batch, by definition. Image i of N is in group i mod (N // group_size).
    So a batch of any size has groups of at least ``group_size`` images, or is a single group if it is smaller. With
    several processes, groups are those of a process's own images.

    Computed in float32 at least.

    Args:
        group_size: at least 2; None: all images of a batch are one group.
        channels: how many to append; the number of the input's channels must be a multiple.

    Raises:
        TypeError, ValueError: an argument is not as above.

    >>> MinibatchStdDev()(torch.randn(8, 16, 4, 4)).shape
    torch.Size([8, 17, 4, 4])

    Source: Karras et al., "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (2018), section
    3; groups as in Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020).
    """

    def __init__(self, group_size: int | None = 4, channels: int = 1) -> None:
        super().__init__()
        self.group_size = None if group_size is None else integer("group_size", group_size, least=2)
        self.channels = integer("channels", channels, least=1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C + channels, ...), of the same dtype and memory format.

        Raises:
            ValueError: a batch of 1 image, which has no deviation; C is no multiple of ``channels``.
        """
        _check(input, self.channels)
        n, parts = input.shape[0], self.channels
        if n == 0:
            return torch.cat((input, input[:, :parts]), 1)
        groups = 1 if self.group_size is None else max(n // self.group_size, 1)
        features = widened(input).reshape(n, -1)
        deviations = _deviations(features, groups).reshape(groups, parts, -1).mean(2)
        per_image = deviations.repeat(-(-n // groups), 1)[:n].to(input.dtype)
        appended = per_image.reshape(n, parts, *[1] * (input.dim() - 2)).expand(n, parts, *input.shape[2:])
        y = torch.cat((input, appended), 1)
        # A channel alone has both formats, of which the wrong one may be taken.
        is_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last) if is_last else y

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, channels={self.channels}"


def _deviations(features: Tensor, groups: int) -> Tensor:
    """(N, D) -> (groups, D): the standard deviations over the images i of each group, i mod ``groups``."""
    n, size = features.shape
    most = -(-n // groups)
    # Groups differ in size by one image at most: what lacks counts nothing.
    grouped = F.pad(features, (0, 0, 0, most * groups - n)).reshape(most, groups, size)
    is_there = (torch.arange(most * groups, device=features.device) < n).reshape(most, groups, 1)
    counts = is_there.sum(0)
    centred = torch.where(is_there, grouped - grouped.sum(0) / counts, 0)
    return (centred.square().sum(0) / counts + _EPS).sqrt()


@torch.fx.wrap
def _check(input: Tensor, channels: int) -> None:
    check_channels("input", input)
    if input.shape[0] == 1:
        raise ValueError("input must hold at least 2 images to have a standard deviation over them, got 1")
    if input.shape[1] % channels:
        raise ValueError(f"input must have a multiple of {channels} channels, got {input.shape[1]}")
