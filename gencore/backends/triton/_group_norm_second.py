"""Group norm's derivatives beyond the gradient, along a direction and of the gradient, as
csrc/include/gencore/group_norm.h says them.

The tensors are read once for sums over the pixels of each channel, and once for the results. All else is sums of few
values in float64. The change dt of the activation's argument is linear in terms of these sums, so that those of
act''(t) dt need not wait for what dt itself is made of.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence

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
from gencore.backends.triton._group_norm_backward import rounded, samples_kernel, total
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add
from gencore.backends.triton.reparameterize import load

# No group is one program's: a thread has up to eleven sums for each of its elements.
_LIMITS = Limits(of_group=0, group_bytes=0, of_tile=1024, bytes_per_thread=16, enough=1024)
# Elements of what is summed up at a time: pieces of channels; samples and channels.
_MERGED = 256
_SUMMED = (16, 32)

_STRIDES = ["scale_stride", "shift_stride", "bias_in_stride"]
_D_STRIDES = [f"d_{stride}" for stride in _STRIDES]
_SIZES = ["span", "spans", "pixels", "of_group"]


@triton.jit
def differentials(d_x, x, at, inside, center, factor, term, SILU: tl.constexpr):
    """Of a tile: d_x and x - center, 0 outside, and the first and second derivative of the activation."""
    away = tl.where(inside, load(x + at, inside) - center[:, None], 0.0)
    d = tl.zeros_like(away)
    if d_x is not None:
        d += load(d_x + at, inside)
    first = tl.full(away.shape, 1.0, away.dtype)
    second = tl.zeros_like(away)
    if SILU:
        first, second = silu_derivatives(multiply_add(away, factor[:, None], term[:, None]), x)
    return d, away, first, second


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])
def pieces_second_kernel(
    grad_y, x, d_x, statistics, partials, weight, bias, scale, shift, bias_in,
    scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64,
    span: tl.int32, spans: tl.int32, pixels: tl.int64, of_group: tl.int32,
    SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Sums over each channel of a piece: of d = d_x, d c and c = x - center; where there are more than three SUMS, of
    h = grad_y act'(t), h c and h d; where there are eleven, of p = grad_y act''(t), p c, p c c, p d and p d c."""
    sample, _, channel, exists, piece, pixel, channels, pixels = place(
        tl.program_id(0), span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    mean, rstd = statistics_of(statistics, sample, channel, exists, channels, of_group)
    center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
    factor, term = coefficients(
        x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
    )
    # Every lane sums up its elements, so that none waits for another.
    ds = tl.zeros((A, B), center.dtype)
    d_cs, cs = tl.zeros_like(ds), tl.zeros_like(ds)
    hs, h_cs, h_ds = tl.zeros_like(ds), tl.zeros_like(ds), tl.zeros_like(ds)
    ps, p_cs, p_c_cs = tl.zeros_like(ds), tl.zeros_like(ds), tl.zeros_like(ds)
    p_ds, p_d_cs = tl.zeros_like(ds), tl.zeros_like(ds)
    for number in range(ROUNDS):
        at, inside = tile(sample, channel, exists, pixel + number * B, channels, pixels, CHANNELS_LAST)
        d, c, first, second = differentials(d_x, x, at, inside, center, factor, term, SUMS > 6)
        ds += d
        d_cs = multiply_add(d, c, d_cs)
        cs += c
        if SUMS > 3:
            g = load(grad_y + at, inside)
            h = tl.where(inside, g * first, 0.0)
            hs += h
            h_cs = multiply_add(h, c, h_cs)
            h_ds = multiply_add(h, d, h_ds)
        if SUMS > 6:
            p = tl.where(inside, g * second, 0.0)
            p_c = p * c
            ps += p
            p_cs += p_c
            p_c_cs = multiply_add(p_c, c, p_c_cs)
            p_ds = multiply_add(p, d, p_ds)
            p_d_cs = multiply_add(p_c, d, p_d_cs)
    pieces = tl.cdiv(pixels, B * ROUNDS)
    slot = partials + SUMS * slots(sample, channel, piece, channels, pieces, CHANNELS_LAST)
    tl.store(slot, tl.sum(ds, axis=1), exists)
    tl.store(slot + 1, tl.sum(d_cs, axis=1), exists)
    tl.store(slot + 2, tl.sum(cs, axis=1), exists)
    if SUMS > 3:
        tl.store(slot + 3, tl.sum(hs, axis=1), exists)
        tl.store(slot + 4, tl.sum(h_cs, axis=1), exists)
        tl.store(slot + 5, tl.sum(h_ds, axis=1), exists)
    if SUMS > 6:
        tl.store(slot + 6, tl.sum(ps, axis=1), exists)
        tl.store(slot + 7, tl.sum(p_cs, axis=1), exists)
        tl.store(slot + 8, tl.sum(p_c_cs, axis=1), exists)
        tl.store(slot + 9, tl.sum(p_ds, axis=1), exists)
        tl.store(slot + 10, tl.sum(p_d_cs, axis=1), exists)


@triton.jit
def of_channels(pointer, channel, exists):
    """Values of channels in float64, 0 where they are left out."""
    values = tl.zeros(channel.shape, tl.float64)
    if pointer is not None:
        values += channel_values(pointer + channel, exists)
    return values


@triton.jit
def of_samples(pointer, stride, sample, channel, exists):
    values = tl.zeros(channel.shape, tl.float64)
    if pointer is not None:
        values += channel_values(pointer + sample * stride + channel, exists)
    return values


@triton.jit
def change_of_coefficients(
    weight, bias, scale, scale_stride, d_weight, d_bias, d_scale, d_shift, d_scale_stride, d_shift_stride, sample,
    channel, exists,
):  # fmt: skip
    """a = weight (1 + scale), and the changes of a and b = bias (1 + scale) + shift."""
    w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
    moved = of_samples(d_scale, d_scale_stride, sample, channel, exists)
    d_a = of_channels(d_weight, channel, exists) * modulation + w * moved
    d_b = of_channels(d_bias, channel, exists) * modulation + of_channels(bias, channel, exists) * moved
    return w * modulation, d_a, d_b + of_samples(d_shift, d_shift_stride, sample, channel, exists)


@triton.jit
def sums_along(
    partials, sample, channel, exists, channels, pieces, pixels, beside, rstd, moved,
    SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums over channels of du = d_x + d_bias_in, of du xhat and of xhat."""
    d = total(partials, 0, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
    d_c = total(partials, 1, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
    c = total(partials, 2, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
    xhats = (c + beside * pixels.to(tl.float64)) * rstd
    return d + moved * pixels.to(tl.float64), (d_c + beside * d) * rstd + moved * xhats, xhats


@triton.jit
def sums_of_gradient(
    partials, sample, channel, exists, channels, pieces, beside, rstd, moved,
    SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums over channels of h, h xhat and h du."""
    h = total(partials, 3, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
    h_c = total(partials, 4, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
    h_d = total(partials, 5, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
    return h, (h_c + beside * h) * rstd, h_d + moved * h


@triton.jit
def sums_of_bend(
    partials, sample, channel, exists, channels, pieces, beside, rstd, moved, a, d_a, d_b, mean_du, mean_du_xhat,
    SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums over channels of k = p dt and of k xhat."""
    k = tl.zeros(channel.shape, tl.float64)
    k_xhat = tl.zeros(channel.shape, tl.float64)
    if SUMS > 6:
        p = total(partials, 6, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        p_c = total(partials, 7, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        p_c_c = total(partials, 8, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        p_d = total(partials, 9, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        p_d_c = total(partials, 10, sample, channel, exists, channels, pieces, SUMS, CHANNELS_LAST, B)
        p_xhat = (p_c + beside * p) * rstd
        p_xhat_xhat = (p_c_c + beside * (2.0 * p_c + beside * p)) * rstd * rstd
        p_du = p_d + moved * p
        p_du_xhat = (p_d_c + beside * p_d) * rstd + moved * p_xhat
        k += a * rstd * (p_du - mean_du * p - mean_du_xhat * p_xhat) + d_a * p_xhat + d_b * p
        k_xhat += a * rstd * (p_du_xhat - mean_du * p_xhat - mean_du_xhat * p_xhat_xhat)
        k_xhat += d_a * p_xhat_xhat + d_b * p_xhat
    return k, k_xhat


@triton.jit(do_not_specialize=[*_STRIDES, *_D_STRIDES, "samples", "groups", "pixels", "of_group", "pieces"])
def merge_second_kernel(
    x, partials, statistics, coefficient, sums, grad_scale, grad_shift, grad_bias_in,
    weight, bias, scale, shift, bias_in,
    scale_stride: tl.int64, shift_stride: tl.int64, bias_in_stride: tl.int64,
    d_weight, d_bias, d_scale, d_shift, d_bias_in,
    d_scale_stride: tl.int64, d_shift_stride: tl.int64, d_bias_in_stride: tl.int64,
    samples: tl.int64, groups: tl.int32, pixels: tl.int64, of_group: tl.int32, pieces: tl.int32,
    SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The gradients of the values of a group's channels, and the coefficients that the results are made with: those of
    the forward pass, of the change dt, and of the gradient of x, one after the other in memory."""
    group = tl.program_id(0)
    sample = (group // groups).to(tl.int64)
    first_channel = (group % groups).to(tl.int64) * of_group
    channels = groups.to(tl.int64) * of_group
    pixels = pixels.to(tl.int64)
    mean = tl.load(statistics + 2 * group.to(tl.int64))
    rstd = tl.load(statistics + 2 * group.to(tl.int64) + 1)
    lane = tl.arange(0, A)
    elements = (of_group * pixels).to(tl.float64)
    of_du, of_du_xhat = tl.zeros((A,), tl.float64), tl.zeros((A,), tl.float64)
    of_q, of_q_xhat, of_q_du = tl.zeros((A,), tl.float64), tl.zeros((A,), tl.float64), tl.zeros((A,), tl.float64)
    for first in range(0, of_group, A):
        channel, exists = first_channel + first + lane, first + lane < of_group
        _, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
        moved = of_samples(d_bias_in, d_bias_in_stride, sample, channel, exists)
        du, du_xhat, _ = sums_along(
            partials, sample, channel, exists, channels, pieces, pixels, beside, rstd, moved, SUMS, CHANNELS_LAST, B
        )
        of_du += du
        of_du_xhat += du_xhat
        if SUMS > 3:
            w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
            h, h_xhat, h_du = sums_of_gradient(
                partials, sample, channel, exists, channels, pieces, beside, rstd, moved, SUMS, CHANNELS_LAST, B
            )
            of_q += w * modulation * h
            of_q_xhat += w * modulation * h_xhat
            of_q_du += w * modulation * h_du
    mean_du, mean_du_xhat = tl.sum(of_du, axis=0) / elements, tl.sum(of_du_xhat, axis=0) / elements
    mean_q, mean_q_xhat = tl.sum(of_q, axis=0) / elements, tl.sum(of_q_xhat, axis=0) / elements
    # Of a h d_xhat, over rstd.
    cross = tl.sum(of_q_du, axis=0) / elements - mean_du * mean_q - mean_du_xhat * mean_q_xhat
    of_v, of_v_xhat = tl.zeros((A,), tl.float64), tl.zeros((A,), tl.float64)
    if SUMS > 3:
        for first in range(0, of_group, A):
            channel, exists = first_channel + first + lane, first + lane < of_group
            _, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
            moved = of_samples(d_bias_in, d_bias_in_stride, sample, channel, exists)
            a, d_a, d_b = change_of_coefficients(
                weight, bias, scale, scale_stride, d_weight, d_bias, d_scale, d_shift, d_scale_stride, d_shift_stride,
                sample, channel, exists,
            )  # fmt: skip
            h, h_xhat, _ = sums_of_gradient(
                partials, sample, channel, exists, channels, pieces, beside, rstd, moved, SUMS, CHANNELS_LAST, B
            )
            k, k_xhat = sums_of_bend(
                partials, sample, channel, exists, channels, pieces, beside, rstd, moved, a, d_a, d_b, mean_du,
                mean_du_xhat, SUMS, CHANNELS_LAST, B,
            )  # fmt: skip
            of_v += a * k + d_a * h
            of_v_xhat += a * k_xhat + d_a * h_xhat
    mean_v = tl.sum(of_v, axis=0) / elements - rstd * (mean_q_xhat * mean_du + mean_du_xhat * mean_q)
    mean_v_xhat = tl.sum(of_v_xhat, axis=0) / elements - 2.0 * rstd * mean_q_xhat * mean_du_xhat
    # What xhat is multiplied with in the gradient of x.
    along_xhat = mean_v_xhat + rstd * cross
    for first in range(0, of_group, A):
        channel, exists = first_channel + first + lane, first + lane < of_group
        center, beside = centers(x, mean, bias_in, bias_in_stride, sample, channel, exists)
        moved = of_samples(d_bias_in, d_bias_in_stride, sample, channel, exists)
        a, d_a, d_b = change_of_coefficients(
            weight, bias, scale, scale_stride, d_weight, d_bias, d_scale, d_shift, d_scale_stride, d_shift_stride,
            sample, channel, exists,
        )  # fmt: skip
        at, step = sample * channels + channel, samples * channels
        if coefficient is not None:
            factor, term = coefficients(
                x, rstd, beside, weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, exists
            )
            of_away = rstd * (d_a - a * rstd * mean_du_xhat)
            tl.store(coefficient + at, center, exists)
            tl.store(coefficient + at + step, factor, exists)
            tl.store(coefficient + at + 2 * step, term, exists)
            tl.store(coefficient + at + 3 * step, arithmetic(of_away, x), exists)
            constant = a * rstd * (moved - mean_du) + beside * of_away + d_b
            tl.store(coefficient + at + 4 * step, arithmetic(constant, x), exists)
            if SUMS > 3:
                of_d = tl.zeros((A,), tl.float64) - rstd * rstd * mean_q_xhat
                of_away = tl.zeros((A,), tl.float64) - rstd * rstd * along_xhat
                constant = of_d * moved + of_away * beside - rstd * mean_v
                tl.store(coefficient + at + 5 * step, arithmetic(of_d, x), exists)
                tl.store(coefficient + at + 6 * step, arithmetic(of_away, x), exists)
                tl.store(coefficient + at + 7 * step, arithmetic(constant, x), exists)
        if SUMS > 3:
            w, modulation = scaling(weight, scale, scale_stride, sample, channel, exists)
            du, _, xhats = sums_along(
                partials, sample, channel, exists, channels, pieces, pixels, beside, rstd, moved, SUMS, CHANNELS_LAST, B
            )
            h, h_xhat, h_du = sums_of_gradient(
                partials, sample, channel, exists, channels, pieces, beside, rstd, moved, SUMS, CHANNELS_LAST, B
            )
            k, k_xhat = sums_of_bend(
                partials, sample, channel, exists, channels, pieces, beside, rstd, moved, a, d_a, d_b, mean_du,
                mean_du_xhat, SUMS, CHANNELS_LAST, B,
            )  # fmt: skip
            of_a = k_xhat + rstd * (h_du - mean_du * h - mean_du_xhat * h_xhat)
            if sums is not None:
                turned = of_samples(d_scale, d_scale_stride, sample, channel, exists)
                tl.store(sums + 2 * at, modulation * of_a + turned * h_xhat, exists)
                tl.store(sums + 2 * at + 1, modulation * k + turned * h, exists)
            if grad_scale is not None:
                gradient = w * of_a + of_channels(bias, channel, exists) * k
                gradient += of_channels(d_weight, channel, exists) * h_xhat + of_channels(d_bias, channel, exists) * h
                tl.store(grad_scale + at, rounded(gradient, grad_scale), exists)
            if grad_shift is not None:
                tl.store(grad_shift + at, rounded(k, grad_shift), exists)
            if grad_bias_in is not None:
                gradient = a * k + d_a * h - rstd * (mean_q_xhat * du + mean_du_xhat * a * h)
                gradient = rstd * (gradient - pixels.to(tl.float64) * mean_v - xhats * along_xhat)
                tl.store(grad_bias_in + at, rounded(gradient, grad_bias_in), exists)


@triton.jit(do_not_specialize=["samples", "span", "spans", "pixels"])
def apply_second_kernel(
    grad_y, x, d_x, coefficient, d_y, grad_x, samples: tl.int64, span: tl.int32, spans: tl.int32, pixels: tl.int64,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """What y changes by, which is the gradient of grad_y too, and the gradient of x."""
    # Backwards: what was read last is the likeliest to be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, _, channel, exists, _, pixel, channels, pixels = place(
        program, span, spans, pixels, CHANNELS_LAST, A, B, ROUNDS, UNIT
    )
    of_channel, step = coefficient + sample * channels + channel, samples * channels
    center = tl.load(of_channel, exists, other=0.0)
    factor = tl.load(of_channel + step, exists, other=0.0)
    term = tl.load(of_channel + 2 * step, exists, other=0.0)
    of_away = tl.load(of_channel + 3 * step, exists, other=0.0)
    constant = tl.load(of_channel + 4 * step, exists, other=0.0)
    for number in range(ROUNDS):
        at, inside = tile(sample, channel, exists, pixel + number * B, channels, pixels, CHANNELS_LAST)
        d, away, first, second = differentials(d_x, x, at, inside, center, factor, term, SILU)
        change = multiply_add(d, factor[:, None], multiply_add(away, of_away[:, None], constant[:, None]))
        if d_y is not None:
            tl.store(d_y + at, (first * change).to(d_y.dtype.element_ty), inside)
        if grad_x is not None:
            last_of_d = tl.load(of_channel + 5 * step, exists, other=0.0)
            last_of_away = tl.load(of_channel + 6 * step, exists, other=0.0)
            last = tl.load(of_channel + 7 * step, exists, other=0.0)
            g = load(grad_y + at, inside)
            gradient = multiply_add(d, last_of_d[:, None], multiply_add(away, last_of_away[:, None], last[:, None]))
            gradient = multiply_add(g * first, of_away[:, None], gradient)
            if SILU:
                gradient = multiply_add(g * second * change, factor[:, None], gradient)
            tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), inside)


def group_norm_jvp(
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias_in: Tensor | None,
    d_x: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_scale: Tensor | None,
    d_shift: Tensor | None,
    d_bias_in: Tensor | None,
    activation: str | None,
    eps: float,
) -> Tensor:
    """``eps``: what the statistics hold already."""
    x, d_x = in_format(suggested_format(x), x, d_x)
    d_y = torch.empty_like(x)
    values, d_values = (weight, bias, scale, shift, bias_in), (d_weight, d_bias, d_scale, d_shift, d_bias_in)
    if x.numel():
        _launch(None, x, d_x, statistics, num_groups, values, d_values, activation, [d_y, *[None] * 6])
    return d_y


def group_norm_double_backward(
    grad_y: Tensor,
    x: Tensor,
    statistics: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bias_in: Tensor | None,
    d_x: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_scale: Tensor | None,
    d_shift: Tensor | None,
    d_bias_in: Tensor | None,
    activation: str | None,
    wanted: list[bool],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """``eps``: what the statistics hold already."""
    grad_y, x, d_x = in_format(suggested_format(x), grad_y, x, d_x)
    values, d_values = (weight, bias, scale, shift, bias_in), (d_weight, d_bias, d_scale, d_shift, d_bias_in)
    of_values = empty_gradients(values, wanted[2:])
    grads = [*(torch.empty_like(x) if want else None for want in wanted[:2]), *of_values]
    if x.numel():
        _launch(grad_y, x, d_x, statistics, num_groups, values, d_values, activation, grads)
    else:
        for grad in of_values:
            if grad is not None:
                grad.zero_()
    return tuple(grads)


def _launch(
    grad_y: Tensor | None,
    x: Tensor,
    d_x: Tensor | None,
    statistics: Tensor,
    num_groups: int,
    values: Sequence[Tensor | None],
    d_values: Sequence[Tensor | None],
    activation: str | None,
    grads: Sequence[Tensor | None],
) -> None:
    """``grads``: where to write what y changes by, and the gradients of x and the values; None: it is not wanted."""
    grad_y, d_x = (tensor if tensor is None else aligned(tensor) for tensor in (grad_y, d_x))
    x, statistics = aligned(x), statistics.contiguous()
    samples, channels = x.shape[:2]
    pixels = x.numel() // (samples * channels)
    last = suggested_format(x) is not torch.contiguous_format
    work = cut(channels, pixels, num_groups, last, x.element_size(), _LIMITS)
    constants, silu = work.constants, activation == "silu"
    d_y, grad_x, grad_weight, grad_bias, *of_samples = grads
    with_weight = grad_weight is not None or grad_bias is not None
    sums = x.new_empty((samples, channels, 2), dtype=torch.float64) if with_weight else None
    number = 3 if grad_y is None else 11 if silu else 6
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = x.new_empty((samples, channels, work.pieces, number), dtype=dtype)
    written = d_y is not None or grad_x is not None
    coefficient = x.new_empty((5 if grad_y is None else 8, samples, channels), dtype=dtype) if written else None
    arguments, grid = value_arguments(*values), (samples * work.programs,)
    b = min(triton.next_power_of_2(work.pieces), _SUMMED[1])
    a = min(triton.next_power_of_2(work.sizes[3]), _MERGED // b)
    with device_of(x):
        pieces_second_kernel[grid](
            grad_y, x, d_x, statistics, partials, *arguments, *work.sizes, SUMS=number, **constants
        )
        merge_second_kernel[(samples * num_groups,)](
            x, partials, statistics, coefficient, sums, *of_samples, *arguments, *value_arguments(*d_values),
            samples, num_groups, pixels, work.sizes[3], work.pieces,
            SUMS=number, CHANNELS_LAST=constants["CHANNELS_LAST"], A=a, B=b, enable_fp_fusion=False,
        )  # fmt: skip
        if coefficient is not None:
            apply_second_kernel[grid](
                grad_y, x, d_x, coefficient, d_y, grad_x, samples, *work.sizes[:3], SILU=silu, **constants
            )
        if sums is not None:
            a, b = _SUMMED
            samples_kernel[(triton.cdiv(channels, b),)](
                sums, grad_weight, grad_bias, samples, channels, A=a, B=b, enable_fp_fusion=False
            )
