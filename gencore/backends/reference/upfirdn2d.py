"""Definitions of :func:`gencore.ops.upfirdn2d` and of the gradient for its filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    start: Sequence[int],
    size: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """y[o] = gain sum_k w[k] padded[o down + k] in both dimensions, w the filter turned around.

    ``start`` is the padding before rows and columns, and ``size`` that of y, which says what is behind them.
    """
    weights = torch.outer(filter, filter) if filter.dim() == 1 else filter
    if not flip_filter:
        weights = weights.flip(0, 1)
    y = x.new_zeros(*x.shape[:2], *size)
    for ky, kx, met in _met(x, weights.shape, up, down, start, size):
        y = y + weights[ky, kx] * met
    return gain * y


def filter_gradient(
    grad_y: Tensor,
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    start: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """The gradient for ``filter``, of a sum over the pixels, the channels and the samples, each in one thread."""
    taps = (len(filter), filter.shape[-1])
    sums = [(grad_y * met).sum((2, 3)) for _, _, met in _met(x, taps, up, down, start, grad_y.shape[2:])]
    grad = gain * torch.stack(sums).sum(2).sum(1).reshape(taps)
    if not flip_filter:
        grad = grad.flip(0, 1)
    return ((grad + grad.T) * filter).sum(1) if filter.dim() == 1 else grad


def _met(
    x: Tensor, taps: Sequence[int], up: Sequence[int], down: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> Iterator[tuple[int, int, Tensor]]:
    """Every tap, and for each pixel of y what the tap multiplies there."""
    n, c, h, w = x.shape
    spread = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up[1] - 1, 0, 0, 0, up[0] - 1)).reshape(n, c, h * up[0], w * up[1])
    spans = [(n - 1) * d + t for n, d, t in zip(size, down, taps, strict=True)]
    cropped = spread[:, :, max(-start[0], 0) :, max(-start[1], 0) :]
    before = [max(s, 0) for s in start]
    behind = [max(span - b - n, 0) for span, b, n in zip(spans, before, cropped.shape[2:], strict=True)]
    padded = F.pad(cropped, (before[1], behind[1], before[0], behind[0]))
    for ky in range(taps[0]):
        for kx in range(taps[1]):
            ends = ky + (size[0] - 1) * down[0] + 1, kx + (size[1] - 1) * down[1] + 1
            yield ky, kx, padded[:, :, ky : ends[0] : down[0], kx : ends[1] : down[1]]
