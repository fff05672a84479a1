"""The gradients of fused group normalization, as csrc/include/gencore/group_norm.h says them.

With a and b the sums over a channel's pixels of dt and of dt xhat, all that is summed over more than one channel, or
over samples, is a sum of few values in float64. So the tensor is read once for a and b, and once for the gradient of x.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import empty_gradients, in_format, suggested_format
from gencore.backends.triton._activations import silu_derivatives
from gencore.backends.triton._group_norm import (
    Limits,
    aligned,
    arithmetic,
    centers,
    channel_values,
    coefficients,
    cut,
    place,
    scaling,
    slots,
    statistics_of,
    tile,
    value_arguments,
)
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add
from gencore.backends.triton.reparameterize import load

# Half of what the forward pass takes at a time, because here two tensors are read.
_LIMITS = Limits(of_group=8192, group_bytes=32768, of_tile=2048, bytes_per_thread=32, enough=1024)
# Elements of what is summed up at a time: pieces of channels; samples and channels.
_MERGED = 512
_SUMMED = (16, 32)

_STRIDES = ["scale_stride", "shift_stride", "bias_in_stride"]
_SIZES = ["span", "spans", "pixels", "of_group"]


@triton.jit
def differentials(grad_y, x, at, inside, center, factor, term, SILU: tl.constexpr):
    """dt and x - center of a tile, 0 outside."""
    dt = load(grad_y + at, inside)
    away = load(x + at, inside) - center[:, None]
    if SILU:
        dt *= silu_derivatives(multiply_add(away, factor[:, None], term[:, None]), x)[0]
        dt = tl.where(inside, dt, 0.0)
    return dt, tl.where(inside, away, 0.0)


@triton.jit
def gradient_of_x(dt, away, of_dt, of_away, constant):
    return multiply_add(dt, of_dt[:, None], -multiply_add(away, of_away[:, None], constant[:, None]))


@triton.jit
def gradient_coefficients(x, rstd, beside, k, mean_a, mean_b):
    """Those of (k dt - mean_a - xhat mean_b) rstd."""
    of_away = mean_b * rstd * rstd
    constant = mean_a * rstd + of_away * beside
    return arithmetic(k * rstd, x), arithmetic(of_away, x), arithmetic(constant, x)


@triton.jit
def store_channels(
    sums, grad_scale, grad_shift, grad_bias_in, weight, bias, scale, scale_stride, sample, channel, exists, channels,
    pixels, a, b, xhats, rstd, mean_a, mean_b,
):  # fmt: skip
    """The gradients of scale, shift and bias_in, and in `sums` what those of weight and bias are the sums of."""
    w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
    at = sample * channels + channel
    if sums is not None:
        tl.store(sums + 2 * at, modulation * b, exists)
        tl.store(sums + 2 * at + 1, modulation * a, exists)
    if grad_scale is not None:
        gradient = w * b
        if bias is not None:
            gradient += channel_values(bias + channel, exists) * a
        tl.store(grad_scale + at, rounded(gradient, grad_scale), exists)
    if grad_shift is not None:
        tl.store(grad_shift + at, rounded(a, grad_shift), exists)
    if grad_bias_in is not None:
        gradient = rstd * (w * modulation * a - pixels.to(tl.float64) * mean_a - mean_b * xhats)
        tl.store(grad_bias_in + at, rounded(gradient, grad_bias_in), exists)


@triton.jit
def rounded(value, pointer):
    """A float64 value as memory has it. From float64 to a half type there is no instruction."""
    if pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])
def group_backward_kernel(
    grad_y, x, statistics, grad_x, sums, grad_scale, grad_shift, grad_bias_in, weight, bias, scale, shift, bias_in,
    scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64,
    span: tl.int32, spans: tl.int32, pixels: tl.int64, of_group: tl.int32,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """All of a group, read once."""
    sample, _, channel, exists, _, pixel, channels, pixels = place(
        tl.program_id(0), span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    at, inside = tile(sample, channel, exists, pixel, channels, pixels, CHANNELS_LAST)
    mean, rstd = statistics_of(statistics, sample, channel, exists, channels, of_group)
    center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
    factor, term = coefficients(
        x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
    )
    dt, away = differentials(grad_y, x, at, inside, center, factor, term, SILU)
    a, b = tl.sum(dt, axis=1).to(tl.float64), tl.sum(dt * away, axis=1).to(tl.float64)
    b = (b + beside * a) * rstd
    w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
    k = w * modulation
    elements = (of_group * pixels).to(tl.float64)
    mean_a = tl.sum(tl.where(exists, k * a, 0.0), axis=0) / elements
    mean_b = tl.sum(tl.where(exists, k * b, 0.0), axis=0) / elements
    if grad_x is not None:
        of_dt, of_away, constant = gradient_coefficients(x, rstd, beside, k, mean_a, mean_b)
        gradient = gradient_of_x(dt, away, of_dt, of_away, constant)
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), inside)
    xhats = a
    if grad_bias_in is not None:
        xhats = (tl.sum(away, axis=1).to(tl.float64) + beside * pixels.to(tl.float64)) * rstd
    store_channels(
        sums, grad_scale, grad_shift, grad_bias_in, weight, bias, scale, scale_stride, sample, channel, exists,
        channels, pixels, a, b, xhats, rstd, mean_a, mean_b,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])
def pieces_backward_kernel(
    grad_y, x, statistics, partials, weight, bias, scale, shift, bias_in,
    scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64,
    span: tl.int32, spans: tl.int32, pixels: tl.int64, of_group: tl.int32,
    SUMS: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The sums of dt, of dt (x - center) and, if there are three SUMS, of x - center over each channel of a piece."""
    sample, _, channel, exists, piece, pixel, channels, pixels = place(
        tl.program_id(0), span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    mean, rstd = statistics_of(statistics, sample, channel, exists, channels, of_group)
    center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
    factor, term = coefficients(
        x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
    )
    # Every lane sums up its elements, so that none waits for another.
    a = tl.zeros((A, B), center.dtype)
    b = tl.zeros_like(a)
    aways = tl.zeros_like(a)
    for number in range(ROUNDS):
        at, inside = tile(sample, channel, exists, pixel + number * B, channels, pixels, CHANNELS_LAST)
        dt, away = differentials(grad_y, x, at, inside, center, factor, term, SILU)
        a += dt
        b = multiply_add(dt, away, b)
        if SUMS == 3:
            aways += away
    pieces = tl.cdiv(pixels, B * ROUNDS)
    slot = partials + SUMS * slots(sample, channel, piece, channels, pieces, CHANNELS_LAST)
    tl.store(slot, tl.sum(a, axis=1), exists)
    tl.store(slot + 1, tl.sum(b, axis=1), exists)
    if SUMS == 3:
        tl.store(slot + 2, tl.sum(aways, axis=1), exists)


@triton.jit
def total(
    partials, number, sample, channel, exists, channels, pieces, SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """The sum of that number over all pieces of channels."""
    sums = tl.zeros([channel.shape[0], B], tl.float64)
    for first in range(0, pieces, B):
        piece = (first + tl.arange(0, B)).to(tl.int64)[None, :]
        slot = slots(sample, channel[:, None], piece, channels, pieces, CHANNELS_LAST)
        sums += tl.load(partials + SUMS * slot + number, exists[:, None] & (piece < pieces), other=0.0).to(tl.float64)
    return tl.sum(sums, axis=1)


@triton.jit(do_not_specialize=[*_STRIDES, "samples", "groups", "pixels", "of_group", "pieces"])
def merge_backward_kernel(
    x, partials, statistics, coefficient, sums, grad_scale, grad_shift, grad_bias_in, weight, bias, scale, shift,
    bias_in, scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64,
    samples: tl.int64, groups: tl.int32, pixels: tl.int64, of_group: tl.int32, pieces: tl.int32,
    SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradients of the values of a group's channels, and what grad_x is made with: the coefficients of the forward
    pass and those of gradient_coefficients, one after the other in memory."""
    group = tl.program_id(0)
    sample = (group // groups).to(tl.int64)
    first_channel = (group % groups).to(tl.int64) * of_group
    channels = groups.to(tl.int64) * of_group
    pixels = pixels.to(tl.int64)
    mean = tl.load(statistics + 2 * group.to(tl.int64))
    rstd = tl.load(statistics + 2 * group.to(tl.int64) + 1)
    lane = tl.arange(0, A)
    mean_a = tl.zeros((A,), tl.float64)
    mean_b = tl.zeros((A,), tl.float64)
    for first in range(0, of_group, A):
        channel, exists = first_channel + first + lane, first + lane < of_group
        _, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
        w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
        k = tl.where(exists, w * modulation, 0.0)
        a = total(partials, 0, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        b = total(partials, 1, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        mean_a += k * a
        mean_b += k * tl.where(exists, (b + beside * a) * rstd, 0.0)
    elements = (of_group * pixels).to(tl.float64)
    mean_a = tl.sum(mean_a, axis=0) / elements
    mean_b = tl.sum(mean_b, axis=0) / elements
    # What was summed up is summed up again: a group may have more channels than registers hold.
    for first in range(0, of_group, A):
        channel, exists = first_channel + first + lane, first + lane < of_group
        center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
        a = total(partials, 0, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        b = total(partials, 1, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        b = (b + beside * a) * rstd
        xhats = a
        if SUMS == 3:
            xhats = total(partials, 2, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
            xhats = (xhats + beside * pixels.to(tl.float64)) * rstd
        store_channels(
            sums, grad_scale, grad_shift, grad_bias_in, weight, bias, scale, scale_stride, sample, channel, exists,
            channels, pixels, a, b, xhats, rstd, mean_a, mean_b,
        )  # fmt: skip
        if coefficient is not None:
            factor, term = coefficients(
                x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
            )
            w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
            of_dt, of_away, constant = gradient_coefficients(x, rstd, beside, w * modulation, mean_a, mean_b)
            at, step = coefficient + sample * channels + channel, samples * channels
            tl.store(at, center, exists)
            tl.store(at + step, factor, exists)
            tl.store(at + 2 * step, term, exists)
            tl.store(at + 3 * step, of_dt, exists)
            tl.store(at + 4 * step, of_away, exists)
            tl.store(at + 5 * step, constant, exists)


@triton.jit(do_not_specialize=["samples", "span", "spans", "pixels"])
def apply_backward_kernel(
    grad_y, x, coefficient, grad_x, samples: tl.int64, span: tl.int32, spans: tl.int32, pixels: tl.int64,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    # Backwards: what was read last is the likeliest to be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, _, channel, exists, _, pixel, channels, pixels = place(
        program, span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    of_channel, step = coefficient + sample * channels + channel, samples * channels
    center = tl.load(of_channel, exists, other=0.0)
    factor = tl.load(of_channel + step, exists, other=0.0)
    term = tl.load(of_channel + 2 * step, exists, other=0.0)
    of_dt = tl.load(of_channel + 3 * step, exists, other=0.0)
    of_away = tl.load(of_channel + 4 * step, exists, other=0.0)
    constant = tl.load(of_channel + 5 * step, exists, other=0.0)
    for number in range(ROUNDS):
        at, inside = tile(sample, channel, exists, pixel + number * B, channels, pixels, CHANNELS_LAST)
        dt, away = differentials(grad_y, x, at, inside, center, factor, term, SILU)
        gradient = gradient_of_x(dt, away, of_dt, of_away, constant)
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["samples", "channels"])
def samples_kernel(
    sums, grad_weight, grad_bias, samples: tl.int64, channels: tl.int64, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias: sums over samples."""
    channel = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[None, :]
    lane = tl.arange(0, A)[:, None]
    of_weight = tl.zeros((A, B), tl.float64)
    of_bias = tl.zeros((A, B), tl.float64)
    for first in range(0, samples, A):
        exists = (first + lane < samples) & (channel < channels)
        at = sums + 2 * ((first + lane) * channels + channel)
        of_weight += tl.load(at, exists, other=0.0)
        of_bias += tl.load(at + 1, exists, other=0.0)
    if grad_weight is not None:
        gradient = rounded(tl.sum(of_weight, axis=0, keep_dims=True), grad_weight)
        tl.store(grad_weight + channel, gradient, channel < channels)
    if grad_bias is not None:
        gradient = rounded(tl.sum(of_bias, axis=0, keep_dims=True), grad_bias)
        tl.store(grad_bias + channel, gradient, channel < channels)


def group_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias_in: Tensor | None,
    activation: str | None,
    wanted: list[bool],
    eps: float = 0.0,
) -> tuple[Tensor | None, ...]:
    """``eps``: what the statistics hold already."""
    memory_format = suggested_format(x)
    grad_y, x = in_format(memory_format, grad_y, x)
    statistics = statistics.contiguous()
    grads = empty_gradients((weight, bias, scale, shift, bias_in), wanted[1:])
    grad_x = torch.empty_like(x) if wanted[0] else None
    if x.numel():
        _launch(grad_y, x, statistics, num_groups, (weight, bias, scale, shift, bias_in), activation, grad_x, grads)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    return grad_x, *grads


def _launch(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    values: tuple[Tensor | None, ...],
    activation: str | None,
    grad_x: Tensor | None,
    grads: list[Tensor | None],
) -> None:
    grad_y, x = aligned(grad_y), aligned(x)
    samples, channels = x.shape[:2]
    pixels = x.numel() // (samples * channels)
    last = suggested_format(x) is not torch.contiguous_format
    work = cut(channels, pixels, num_groups, last, x.element_size(), _LIMITS)
    constants = work.constants
    grad_weight, grad_bias, *of_samples = grads
    with_weight = grad_weight is not None or grad_bias is not None
    sums = x.new_empty((samples, channels, 2), dtype=torch.float64) if with_weight else None
    arguments, silu = value_arguments(*values), activation == "silu"
    grid = (samples * work.programs,)
    with device_of(x):
        if work.whole:
            group_backward_kernel[grid](
                grad_y, x, statistics, grad_x, sums, *of_samples, *arguments, *work.sizes, SILU=silu, **constants
            )
        else:
            number = 2 if of_samples[2] is None else 3
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            partials = x.new_empty((samples, channels, work.pieces, number), dtype=dtype)
            pieces_backward_kernel[grid](
                grad_y, x, statistics, partials, *arguments, *work.sizes, SUMS=number, SILU=silu, **constants
            )
            coefficient = None if grad_x is None else x.new_empty((6, samples, channels), dtype=dtype)
            b = min(triton.next_power_of_2(work.pieces), _SUMMED[1])
            a = min(triton.next_power_of_2(work.sizes[3]), _MERGED // b)
            merge_backward_kernel[(samples * num_groups,)](
                x, partials, statistics, coefficient, sums, *of_samples, *arguments,
                samples, num_groups, pixels, work.sizes[3], work.pieces,
                SUMS=number, CHANNELS_LAST=constants["CHANNELS_LAST"], A=a, B=b, enable_fp_fusion=False,
            )  # fmt: skip
            if grad_x is not None:
                apply_backward_kernel[grid](
                    grad_y, x, coefficient, grad_x, samples, *work.sizes[:3], SILU=silu, **constants
                )
        if sums is not None:
            a, b = _SUMMED
            samples_kernel[(triton.cdiv(channels, b),)](
                sums, grad_weight, grad_bias, samples, channels, A=a, B=b, enable_fp_fusion=False
            )
