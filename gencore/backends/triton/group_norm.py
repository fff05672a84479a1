"""Fused group normalization. What it computes is said in csrc/include/gencore/group_norm.h.

A small group is one program's: it is read once. Others are read twice, the second time mostly from the cache: for the
statistics of pieces, and, when those of each group are known, for the result.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import suggested_format
from gencore.backends.triton._activations import silu
from gencore.backends.triton._group_norm import (
    Limits,
    aligned,
    arithmetic,
    centers,
    channel_values,
    coefficients,
    cut,
    place,
    slots,
    tile,
    value_arguments,
)
from gencore.backends.triton._group_norm_backward import group_norm_backward as group_norm_backward
from gencore.backends.triton._group_norm_second import group_norm_double_backward as group_norm_double_backward
from gencore.backends.triton._group_norm_second import group_norm_jvp as group_norm_jvp
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add
from gencore.backends.triton.reparameterize import load

# 32 elements for each of 512 threads; four accesses of 16 bytes for each thread.
_LIMITS = Limits(of_group=16384, group_bytes=65536, of_tile=4096, bytes_per_thread=64, enough=2048)
# Up to so many slots, every program merges those of its group, which is quicker than one more launch.
_FEW_SLOTS = 256
_MOST_SLOTS = 1024
_CHANNELS = 128

_STRIDES = ["scale_stride", "shift_stride", "bias_in_stride"]
_SIZES = ["span", "spans", "pixels", "of_group"]


@triton.jit
def activated(away, x, factor, term, SILU: tl.constexpr):
    t = multiply_add(away, factor[:, None], term[:, None])
    return silu(t, x) if SILU else t


@triton.jit
def reciprocal_root(variance, eps):
    # What rounding leaves below zero; NaN stays.
    return 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)


@triton.jit
def store_statistics(statistics, group, mean, rstd, where):
    at = statistics + 2 * group.to(tl.int64)
    tl.store(at, mean, where)
    tl.store(at + 1, rstd, where)


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "eps"])
def group_kernel(
    x, y, statistics, weight, bias, scale, shift, bias_in,
    scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64, eps: tl.float64,
    span: tl.int32, spans: tl.int32, pixels: tl.int64, of_group: tl.int32,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """All of a group: two passes over registers.

    The mean is summed up in float64, so that even a result near 0, of an element near the mean, is right in all digits.
    """
    program = tl.program_id(0)
    sample, _, channel, exists, _, pixel, channels, pixels = place(
        program, span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    at, inside = tile(sample, channel, exists, pixel, channels, pixels, CHANNELS_LAST)
    value = load(x + at, inside)
    elements = (of_group * pixels).to(tl.float64)
    mean = tl.sum(tl.sum(value.to(tl.float64), axis=1), axis=0) / elements
    if bias_in is not None:
        added = channel_values(bias_in + sample * bias_in_stride + channel, exists)
        mean += tl.sum(added, axis=0) / of_group.to(tl.float64)
    center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
    away = (value - center[:, None]) + arithmetic(beside, x)[:, None]
    squares = tl.where(inside, away * away, 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0).to(tl.float64) / elements
    rstd = reciprocal_root(variance, eps)
    if statistics is not None:
        store_statistics(statistics, program, mean, rstd, True)
    factor, term = coefficients(
        x, rstd, tl.zeros_like(beside), weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
    )
    tl.store(y + at, activated(away, x, factor, term, SILU).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["span", "spans", "pixels"])
def pieces_kernel(
    x, partials, span: tl.int32, spans: tl.int32, pixels: tl.int64,
    CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The mean of each channel of a piece and the sum of squares around it."""
    sample, _, channel, exists, piece, pixel, channels, pixels = place(
        tl.program_id(0), span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    at, inside = tile(sample, channel, exists, pixel, channels, pixels, CHANNELS_LAST)
    value = load(x + at, inside)
    # What is not inside is 0.
    total = tl.sum(value.to(tl.float64), axis=1)
    start = piece * (B * ROUNDS)
    # One division, not one for each channel.
    center = arithmetic(total * (1.0 / tl.minimum(pixels - start, B).to(tl.float64)), x)
    away = tl.where(inside, value - center[:, None], 0.0)
    squares = away * away
    for number in range(1, ROUNDS):
        at, inside = tile(sample, channel, exists, pixel + number * B, channels, pixels, CHANNELS_LAST)
        value = load(x + at, inside)
        total += tl.sum(value.to(tl.float64), axis=1)
        away = tl.where(inside, value - center[:, None], 0.0)
        squares = multiply_add(away, away, squares)
    elements = tl.minimum(pixels - start, B * ROUNDS).to(tl.float64)
    mean = total * (1.0 / elements)
    # The first tile's mean is no farther from the piece's than its elements allow: no more than ROUNDS is cancelled.
    beside = center.to(tl.float64) - mean
    around = tl.sum(squares, axis=1).to(tl.float64) - elements * beside * beside
    pieces = tl.cdiv(pixels, B * ROUNDS)
    slot = partials + 2 * slots(sample, channel, piece, channels, pieces, CHANNELS_LAST)
    tl.store(slot, mean, exists)
    tl.store(slot + 1, around, exists)


@triton.jit
def merged(
    partials, bias_in, bias_in_stride, eps, sample, first_channel, of_group, channels, pixels,
    CHANNELS_LAST: tl.constexpr, PIECE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal standard deviation of a group, from the statistics of its pieces, by Chan et al. in float64.

    The sums are of deviations from the first piece's mean. That mean adds its own square distance to the variance, so
    no more is cancelled than the number of slots.
    """
    pieces = tl.cdiv(pixels, PIECE).to(tl.int32)
    count = of_group * pieces
    start = slots(sample, first_channel, 0, channels, pieces, CHANNELS_LAST)
    pivot = tl.load(partials + 2 * start)
    if bias_in is not None:
        of_group_bias = bias_in + sample * bias_in_stride + first_channel
        pivot += channel_values(of_group_bias, True)
    linear = tl.zeros((SLOTS,), tl.float64)
    squares = tl.zeros((SLOTS,), tl.float64)
    for first in range(0, count, SLOTS):
        number = first + tl.arange(0, SLOTS)
        exists = number < count
        # In the order of the workspace.
        if CHANNELS_LAST:
            piece = number // of_group
            channel = number - piece * of_group
        else:
            channel = number // pieces
            piece = number - channel * pieces
        slot = slots(sample, first_channel + channel, piece.to(tl.int64), channels, pieces, CHANNELS_LAST)
        mean = tl.load(partials + 2 * slot, exists, other=0.0)
        around = tl.load(partials + 2 * slot + 1, exists, other=0.0)
        if bias_in is not None:
            mean += channel_values(of_group_bias + channel, exists)
        elements = tl.minimum(pixels - piece.to(tl.int64) * PIECE, PIECE).to(tl.float64)
        deviation = tl.where(exists, mean - pivot, 0.0)
        linear += elements * deviation
        squares += around + elements * deviation * deviation
    elements = (of_group * pixels).to(tl.float64)
    away = tl.sum(linear, axis=0) / elements
    variance = tl.sum(squares, axis=0) / elements - away * away
    return pivot + away, reciprocal_root(variance, eps)


@triton.jit(do_not_specialize=[*_STRIDES, "eps", "samples", "groups", "pixels", "of_group"])
def merge_kernel(
    x, partials, statistics, coefficient, weight, bias, scale, shift, bias_in,
    scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64, eps: tl.float64,
    samples: tl.int64, groups: tl.int32, pixels: tl.int64, of_group: tl.int32,
    CHANNELS_LAST: tl.constexpr, PIECE: tl.constexpr, SLOTS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The statistics of a group, and for each of its channels center, factor and term, in this order in memory."""
    group = tl.program_id(0)
    sample = (group // groups).to(tl.int64)
    first_channel = (group % groups).to(tl.int64) * of_group
    channels = groups.to(tl.int64) * of_group
    mean, rstd = merged(
        partials, bias_in, bias_in_stride, eps, sample, first_channel, of_group, channels, pixels.to(tl.int64),
        CHANNELS_LAST, PIECE, SLOTS,
    )  # fmt: skip
    if statistics is not None:
        store_statistics(statistics, group, mean, rstd, True)
    for first in range(0, of_group, A):
        in_group = first + tl.arange(0, A)
        channel, exists = first_channel + in_group, in_group < of_group
        center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
        factor, term = coefficients(
            x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
        )
        at = coefficient + sample * channels + channel
        tl.store(at, center, exists)
        tl.store(at + samples * channels, factor, exists)
        tl.store(at + 2 * samples * channels, term, exists)


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "eps", "samples"])
def apply_kernel(
    x, y, partials, statistics, coefficient, weight, bias, scale, shift, bias_in,
    scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64, eps: tl.float64, samples: tl.int64,
    span: tl.int32, spans: tl.int32, pixels: tl.int64, of_group: tl.int32,
    SILU: tl.constexpr, SLOTS: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The result, by the coefficients of channels or, if there are `partials`, from the statistics of its pieces."""
    # Backwards: what was read last is the likeliest to be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, first_channel, channel, exists, _, pixel, channels, pixels = place(
        program, span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    if partials is not None:
        mean, rstd = merged(
            partials, bias_in, bias_in_stride, eps, sample, first_channel, of_group, channels, pixels,
            CHANNELS_LAST, B * ROUNDS, SLOTS,
        )  # fmt: skip
        if statistics is not None:
            of_each = tl.cdiv(of_group, A) * tl.cdiv(pixels, B * ROUNDS).to(tl.int32)
            group = program // of_each
            store_statistics(statistics, group, mean, rstd, program == group * of_each)
        center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
        factor, term = coefficients(
            x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
        )
    else:
        of_channel = coefficient + sample * channels + channel
        center = tl.load(of_channel, exists, other=0.0)
        factor = tl.load(of_channel + samples * channels, exists, other=0.0)
        term = tl.load(of_channel + 2 * samples * channels, exists, other=0.0)
    for number in range(ROUNDS):
        at, inside = tile(sample, channel, exists, pixel + number * B, channels, pixels, CHANNELS_LAST)
        result = activated(load(x + at, inside) - center[:, None], x, factor, term, SILU)
        tl.store(y + at, result.to(y.dtype.element_ty), inside)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias_in: Tensor | None,
    activation: str | None,
    eps: float,
    y: Tensor | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None]:
    memory_format = suggested_format(x)
    x = x.contiguous(memory_format=memory_format)
    y = torch.empty_like(x) if y is None else y
    kept = x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float64) if statistics else None
    if x.numel() == 0:
        return y, None if kept is None else kept.zero_()
    x = aligned(x)
    samples, channels = x.shape[:2]
    pixels = x.numel() // (samples * channels)
    work = cut(channels, pixels, num_groups, memory_format is not torch.contiguous_format, x.element_size(), _LIMITS)
    constants, values = work.constants, value_arguments(weight, bias, scale, shift, bias_in)
    grid, silu = (samples * work.programs,), activation == "silu"
    with device_of(x):
        if work.whole:
            group_kernel[grid](x, y, kept, *values, eps, *work.sizes, SILU=silu, **constants)
            return y, kept
        partials: Tensor | None = x.new_empty((samples, channels, work.pieces, 2), dtype=torch.float64)
        pieces_kernel[grid](x, partials, *work.sizes[:3], **constants)
        found, coefficient, last = kept, None, constants["CHANNELS_LAST"]
        slots = channels // num_groups * work.pieces
        most = min(triton.next_power_of_2(slots), _MOST_SLOTS)
        # In channels_last a program has channels of several groups, and too many to work out their coefficients twice.
        if last or slots > _FEW_SLOTS:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            coefficient = x.new_empty((3, samples, channels), dtype=dtype)
            merge_kernel[(samples * num_groups,)](
                x, partials, kept, coefficient, *values, eps, samples, num_groups, pixels, work.sizes[3],
                CHANNELS_LAST=last, PIECE=constants["B"] * constants["ROUNDS"], SLOTS=most, A=_CHANNELS,
                enable_fp_fusion=False,
            )  # fmt: skip
            partials, found, values, most = None, None, (None,) * 5 + (0,) * 3, 0
        apply_kernel[grid](
            x, y, partials, found, coefficient, *values, eps, samples, *work.sizes, SILU=silu, SLOTS=most, **constants
        )
    return y, kept
