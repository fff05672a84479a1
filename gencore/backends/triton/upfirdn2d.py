"""Resampling with a filter. What it computes is said in csrc/include/gencore/upfirdn2d.h.

A program makes some rows of outputs, or, in channels_last, some channels of some pixels. It reads what its taps meet
where it lies; that neighbours read the same again is the cache's business.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import suggested_format
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add
from gencore.backends.triton.reparameterize import load

# Outputs of a program, and of a row of them at most.
_TILE, _MOST_IN_ROW = 1024, 256
_SIZES = ["height", "out_height", "start_y", "width", "out_width", "start_x"]


@triton.jit
def first_met(output, up: tl.constexpr, down: tl.constexpr, start):
    """The first tap of an output that falls on a pixel, and that pixel, which may lie before the image."""
    at = output * down - start
    # The quotient is rounded up, also below 0.
    first = tl.where(at >= 0, (at + (up - 1)) // up, -((-at) // up))
    return first * up - at, first


@triton.jit
def weight(filter, ky, kx, rows, columns, FLIP: tl.constexpr):
    """The filter's value at a tap; 0 beyond it."""
    inside = (ky < rows) & (kx < columns)
    at = ky * columns + kx
    return tl.load(filter + (at if FLIP else rows * columns - 1 - at), inside, other=0.0)


@triton.jit
def weight_of_row(filter, k, taps, FLIP: tl.constexpr):
    """The same of a separable filter."""
    return tl.load(filter + (k if FLIP else taps - 1 - k), k < taps, other=0.0)


@triton.jit(do_not_specialize=["gain", "lines", "channels", *_SIZES])
def kernel(
    x, filter, y, gain: tl.float64, lines: tl.int64, channels: tl.int64,
    height, out_height, start_y, width, out_width, start_x, taps_y, taps_x,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr,
    MET_Y: tl.constexpr, MET_X: tl.constexpr, SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`lines`: rows of y of all planes, or, in channels_last, its pixels; a tile is some lines by some neighbours."""
    line = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)[:, None]
    neighbour = tl.program_id(1) * B + tl.arange(0, B)[None, :]
    if CHANNELS_LAST:
        inside = (line < lines) & (neighbour < channels)
        pixels, ox = line // out_width, (line % out_width).to(tl.int32)
        plane, oy = pixels // out_height, (pixels % out_height).to(tl.int32)
        at, step = plane * (height.to(tl.int64) * width) * channels + neighbour, channels
        to = line * channels + neighbour
    else:
        inside = (line < lines) & (neighbour < out_width)
        plane, oy, ox = line // out_height, (line % out_height).to(tl.int32), neighbour
        at, step = plane * (height.to(tl.int64) * width) + ox * 0, 1
        to = line * out_width + ox
    tap_y, first_y = first_met(oy, UP_Y, DOWN_Y, start_y)
    tap_x, first_x = first_met(ox, UP_X, DOWN_X, start_x)
    zero = (at * 0).to(filter.dtype.element_ty)
    total = zero
    if SEPARABLE:
        for j in range(MET_X):
            kx, ix = tap_x + j * UP_X, first_x + j
            of_rows = zero
            for i in range(MET_Y):
                ky, iy = tap_y + i * UP_Y, first_y + i
                met = inside & (ky < taps_y) & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                value = load(x + at + (iy.to(tl.int64) * width + ix) * step, met)
                of_rows = multiply_add(weight_of_row(filter, ky, taps_y, FLIP) + zero, value, of_rows)
            total = multiply_add(weight_of_row(filter, kx, taps_x, FLIP) + zero, of_rows, total)
    else:
        for i in range(MET_Y):
            ky, iy = tap_y + i * UP_Y, first_y + i
            for j in range(MET_X):
                kx, ix = tap_x + j * UP_X, first_x + j
                met = inside & (ky < taps_y) & (iy >= 0) & (iy < height)
                met = met & (kx < taps_x) & (ix >= 0) & (ix < width)
                value = load(x + at + (iy.to(tl.int64) * width + ix) * step, met)
                total = multiply_add(weight(filter, ky, kx, taps_y, taps_x, FLIP) + zero, value, total)
    factor = (tl.zeros((1, 1), tl.float64) + gain).to(total.dtype)
    tl.store(y + to, (total * factor).to(y.dtype.element_ty), inside)


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
    memory_format = suggested_format(x)
    x, filter = x.contiguous(memory_format=memory_format), filter.contiguous()
    samples, channels, height, width = x.shape
    shape = (samples, channels, *size)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    channels_last = memory_format is not torch.contiguous_format
    if not y.numel():
        return y
    neighbours = channels if channels_last else size[1]
    b = min(triton.next_power_of_2(neighbours), _MOST_IN_ROW)
    lines = y.numel() // neighbours
    a = min(_TILE // b, triton.next_power_of_2(lines))
    taps = filter.shape[0], filter.shape[-1]
    met = [triton.cdiv(n, factor) for n, factor in zip(taps, up, strict=True)]
    with device_of(x):
        kernel[triton.cdiv(lines, a), triton.cdiv(neighbours, b)](
            x, filter, y, gain, lines, channels, height, size[0], start[0], width, size[1], start[1], *taps,
            *up, *down, *met, filter.dim() == 1, flip_filter, channels_last, a, b, enable_fp_fusion=False,
        )  # fmt: skip
    return y
