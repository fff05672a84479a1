"""How group norm is cut into Triton programs, and what its kernels, forward and backward, have in common.

A sample is a matrix of channels x pixels, in channels_last pixels lie apart and channels side by side. A tile is some
channels and some pixels of one sample; a program works through a few tiles of the same channels, one after another: a
piece. Where a group is small, one tile is all of it, and nothing is read twice.

The cut depends on the size of a sample alone, so that the order of a sum does, and neither batch nor GPU change a bit.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_MOST_ROUNDS = 16
# Channels side by side in a tile: 128 bytes in the half types.
_MOST_CHANNELS = 64
# What a memory access moves at least.
_SECTOR = 32


class Limits(NamedTuple):
    """What the programs of a pass can hold."""

    # Of a tile that is a whole group: elements, bytes.
    of_group: int
    group_bytes: int
    # Elements of any other tile.
    of_tile: int
    # Of a tile, in the registers of one thread.
    bytes_per_thread: int
    # So many programs for one sample fill a GPU: where there are more, pieces become longer.
    enough: int


class Cut(NamedTuple):
    """How samples of a shape are cut; :func:`place` reads `sizes` and `constants`."""

    # Whether each tile is a whole group.
    whole: bool
    # Of one sample.
    programs: int
    # How many pieces the pixels of a channel are in.
    pieces: int
    # Integers that change from shape to shape without a new compilation: the channels that a row of tiles goes through
    # (of a group, or all of them), how many such spans there are, pixels, channels of a group.
    sizes: tuple[int, int, int, int]
    # What kernels are compiled for.
    constants: dict[str, Any]


@functools.lru_cache(1024)
def cut(channels: int, pixels: int, groups: int, channels_last: bool, element_size: int, limits: Limits) -> Cut:
    of_group = channels // groups
    # The channels of a single pixel are side by side in every format.
    channels_last = channels_last or pixels == 1
    a, b = triton.next_power_of_2(of_group), triton.next_power_of_2(pixels)
    # In channels_last, a group of few channels is read in shreds of lines, which is no loss only if there are few.
    whole = a * b <= min(limits.of_group, limits.group_bytes // element_size) and (
        not channels_last or of_group * element_size >= _SECTOR or a * b <= 1024
    )
    span, rounds = of_group, 1
    if not whole:
        if channels_last:
            span = channels
            a = _fitting(span, 2 * _SECTOR // element_size, _MOST_CHANNELS)
            b = _fitting(pixels, 16, limits.of_tile // a)
        else:
            b = _fitting(pixels, limits.of_tile // 4, limits.of_tile)
            a = _fitting(span, 1, limits.of_tile // b)
    rows = channels // span * triton.cdiv(span, a)
    tiles = triton.cdiv(pixels, b)
    if not whole:
        while rounds < min(_MOST_ROUNDS, tiles) and rows * tiles > limits.enough * rounds:
            rounds *= 2
    pieces = triton.cdiv(tiles, rounds)
    # The compiler reads and writes as many elements at once as it knows to lie at multiples of that.
    width = span if channels_last else pixels
    unit = next(unit for unit in (16 // element_size, 4, 2, 1) if width % unit == 0)
    sizes = (
        span // unit if channels_last else span, channels // span, pixels if channels_last else pixels // unit, of_group
    )  # fmt: skip
    warps = a * b * element_size // (32 * limits.bytes_per_thread)
    constants = {
        "CHANNELS_LAST": channels_last, "A": a, "B": b, "ROUNDS": rounds, "UNIT": unit,
        "num_warps": max(1, min(16 if whole else 8, warps)), "enable_fp_fusion": False,
    }  # fmt: skip
    return Cut(whole, rows * pieces, pieces, sizes, constants)


def _fitting(n: int, least: int, most: int) -> int:
    """The size of equal parts of n: a power of two that leaves few lanes idle at the end."""
    largest = min(triton.next_power_of_2(n), most)
    best = largest
    for candidate in (largest // 2, largest // 4):
        if candidate >= least and 1.1 * triton.cdiv(n, candidate) * candidate < triton.cdiv(n, best) * best:
            best = candidate
    return best


def aligned(x: Tensor) -> Tensor:
    """Which threads add up what depends on how wide the accesses are, and that on the address."""
    return x.clone() if x.data_ptr() % 16 else x


def value_arguments(*values: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """weight, bias, scale, shift, bias_in, dense along channels, and the elements between samples of the last three."""
    dense = [
        value if value is None or value.shape[-1] == 1 or value.stride(-1) == 1 else value.contiguous()
        for value in values
    ]
    return *dense, *(0 if value is None else value.stride(0) for value in dense[2:])


@triton.jit
def place(
    program, span, spans, pixels, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where the piece of a program lies.

    Returns: sample; the first channel of the span; the channels of the piece and which of them exist; the number of the
    piece and the pixels of its first tile; the sample's channels and pixels.
    """
    if CHANNELS_LAST:
        span = span * UNIT
        pixels = pixels.to(tl.int64)
    else:
        pixels = pixels.to(tl.int64) * UNIT
    # 32 bits suffice for all that is divided here, and are divided several times as fast.
    pieces = tl.cdiv(pixels, B * ROUNDS).to(tl.int32)
    rows = tl.cdiv(span, A)
    row = program // pieces
    piece = program - row * pieces
    first = row // rows
    sample = first // spans
    first_channel = (first - sample * spans) * span
    in_span = (row - first * rows) * A + tl.arange(0, A)
    channel = (first_channel + in_span).to(tl.int64)
    piece = piece.to(tl.int64)
    pixel = piece * (B * ROUNDS) + tl.arange(0, B)
    channels = (spans * span).to(tl.int64)
    return sample.to(tl.int64), first_channel.to(tl.int64), channel, in_span < span, piece, pixel, channels, pixels


@triton.jit
def slots(sample, channel, piece, channels, pieces, CHANNELS_LAST: tl.constexpr):
    """Where a workspace of pieces, which has the order of the tensor, has a piece of a channel."""
    if CHANNELS_LAST:
        slot = (sample * pieces + piece) * channels + channel
    else:
        slot = (sample * channels + channel) * pieces + piece
    return slot


@triton.jit
def tile(sample, channel, exists, pixel, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """The offsets of a tile's elements, channels x pixels, and which of them are inside the tensor."""
    if CHANNELS_LAST:
        at = (sample * pixels + pixel)[None, :] * channels + channel[:, None]
    else:
        at = (sample * channels + channel)[:, None] * pixels + pixel[None, :]
    return at, exists[:, None] & (pixel < pixels)[None, :]


@triton.jit
def arithmetic(value, x):
    """A float64 value in the type that elements of x are computed with."""
    return value if x.dtype.element_ty == tl.float64 else value.to(tl.float32)


@triton.jit
def channel_values(pointers, exists):
    """Values of channels in float64: they are few, and what is made of them is rounded once."""
    value = tl.load(pointers, exists, other=0.0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value.to(tl.float64)


@triton.jit
def scaling(weight, scale, scale_stride, sample, channel, exists):
    """weight, 1 + scale of channels."""
    w = tl.full(channel.shape, 1.0, tl.float64)
    modulation = w
    if weight is not None:
        w = channel_values(weight + channel, exists)
    if scale is not None:
        modulation = 1.0 + channel_values(scale + sample * scale_stride + channel, exists)
    return w, modulation


@triton.jit
def statistics_of(statistics, sample, channel, exists, channels, of_group):
    """Mean and reciprocal standard deviation of the groups that channels are in."""
    group = sample * (channels.to(tl.int32) // of_group) + channel.to(tl.int32) // of_group
    mean = tl.load(statistics + 2 * group, exists, other=0.0)
    return mean, tl.load(statistics + 2 * group + 1, exists, other=0.0)


@triton.jit
def centers(x, mean, bias_in, bias_in_stride, sample, channel, exists):
    """For each channel a rounded number near the mean of x, and what it is beside that mean.

    x less it is exact wherever the difference matters, and what is beside the mean is made up for afterwards.
    """
    exact = tl.zeros(channel.shape, tl.float64) + mean
    if bias_in is not None:
        exact -= channel_values(bias_in + sample * bias_in_stride + channel, exists)
    center = arithmetic(exact, x)
    return center, center.to(tl.float64) - exact


@triton.jit
def coefficients(
    x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists,
):  # fmt: skip
    """factor and term such that the argument of the activation is (x - center) * factor + term."""
    w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
    term = beside * rstd * w
    if bias is not None:
        term += channel_values(bias + channel, exists)
    term *= modulation
    if shift is not None:
        term += channel_values(shift + sample * shift_stride + channel, exists)
    return arithmetic(rstd * w * modulation, x), arithmetic(term, x)
