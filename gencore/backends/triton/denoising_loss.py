"""The training loss of diffusion models. What each kernel computes is said in csrc/include/gencore/denoising_loss.h."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import in_format, kept_format
from gencore.backends.triton._coefficients import (
    any_of,
    coefficient,
    cut_in_format,
    rows_of_tile,
    table_arguments,
)
from gencore.backends.triton._tiles import device_of, key_arguments, place, place_of_pairs, values_of_tile
from gencore.backends.triton.noise import exponential, multiply_add, words_of_rows
from gencore.backends.triton.reparameterize import load

# The interpreter has no map_elementwise, but takes whole tensors where the compiler takes elements.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_HALF_BIN = tl.constexpr(1 / 255)
_PIECES = 1024
_NOT_SPECIALIZED = ["table_rows", "seed", "stream", "sample", "rows", "height", "width"]
# The columns of the table, csrc's.
_OF_X0, _OF_NOISE, _WEIGHT, _BOUND_WEIGHT, _MOVED, _MIDDLE, _HALF_RANGE, _POSTERIOR = map(tl.constexpr, range(8))


@triton.jit
def lower_tail(x):
    """The normal distribution function in float64, with 14 digits down to x = -8, where it is less than 1e-15.

    It is e^(-z^2) g(z) / 2 with z = -x / sqrt(2); g falls from 1 and is fitted with a polynomial in 9 / (3 + z) - 2.
    """
    # fma would round these constants to float32.
    z = tl.minimum(tl.abs(x) * 0.7071067811865476, 6.0, propagate_nan=tl.PropagateNan.ALL)
    u = 9.0 / (3.0 + z) - 2.0
    g = u * -7.375785327890491e-12 + 4.368095339148078e-11
    g = g * u + 5.317044044855283e-11
    g = g * u - 9.277638517466733e-10
    g = g * u + 8.389198238390125e-10
    g = g * u + 1.4442773702850798e-08
    g = g * u - 3.4812701070998304e-08
    g = g * u - 2.27531318174732e-07
    g = g * u + 8.118088344728337e-07
    g = g * u + 4.532601268477542e-06
    g = g * u - 1.5153800078753832e-05
    g = g * u - 0.00012716419745468802
    g = g * u + 7.012531329846451e-05
    g = g * u + 0.003956151636235417
    g = g * u + 0.0233082612326595
    g = g * u + 0.08162684513404897
    g = g * u + 0.20143885681922458
    g = g * u + 0.36815156489826
    g = g * u + 0.3215854164543175
    tail = 0.5 * g * tl.exp(-z * z)
    return tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def bin_of(x0, shift, log_variance):
    """Where the bin of the 8-bit value x0 begins and ends, in standard deviations from the mean x0 + shift, and its
    probability, all in float64.

    Bins are mirrored so that both ends lie in the lower tail as far as they can: there differences lose no digits.
    """
    data = x0.to(tl.float64)
    moved = shift.to(tl.float64)
    per_deviation = tl.exp(log_variance.to(tl.float64) * -0.5)
    lowest, highest = data < -0.999, data > 0.999
    distance = -tl.abs(moved)
    end = (
        tl.where(lowest, _HALF_BIN - moved, tl.where(highest, _HALF_BIN + moved, distance + _HALF_BIN)) * per_deviation
    )
    # The outermost bins reach to infinity; this is as far.
    start = tl.where(lowest | highest, -1e3, (distance - _HALF_BIN) * per_deviation)
    return start, end, lower_tail(end) - tl.where(lowest | highest, 0.0, lower_tail(start))


@triton.jit
def nll_of_element(x0, shift, log_variance):
    _, _, probability = bin_of(x0, shift, log_variance)
    # A number that is no operand of an operator would be rounded to float32.
    least = tl.zeros_like(probability) + 1e-12
    return -tl.log(tl.where(probability < least, least, probability)).to(x0.dtype)


@triton.jit
def slope_of_bin(start, end, probability):
    """The derivative of -log probability with respect to the log variance."""
    at_end, at_start = end * tl.exp(end * end * -0.5), start * tl.exp(start * start * -0.5)
    # 1 / (2 sqrt(2 pi))
    return 0.19947114020071635 * (at_end - at_start) / probability


@triton.jit
def slope_of_element(x0, shift, log_variance):
    start, end, probability = bin_of(x0, shift, log_variance)
    too_small = probability < 1e-12
    if _INTERPRETED:
        slope = tl.where(too_small, 0.0, slope_of_bin(start, end, tl.where(too_small, 1.0, probability)))
    else:
        slope = tl.zeros_like(probability)
        # A branch, so that the compiler keeps the work of one element apart from that of the next.
        if not too_small:
            slope = slope_of_bin(start, end, probability)
    return slope.to(x0.dtype)


# Element by element: with all the elements of a thread under way at once, their float64 takes three times the registers
# that the rest of a kernel needs, also of programs that have no first step.
@triton.jit
def decoder_nll(x0, shift, log_variance):
    """-log p(x0 | x1)."""
    if _INTERPRETED:
        nll = nll_of_element(x0, shift, log_variance)
    else:
        nll = tl.map_elementwise(nll_of_element, x0, shift, log_variance)
    return nll


@triton.jit
def decoder_slope(x0, shift, log_variance):
    """The derivative of :func:`decoder_nll` with respect to the log variance."""
    if _INTERPRETED:
        slope = slope_of_element(x0, shift, log_variance)
    else:
        slope = tl.map_elementwise(slope_of_element, x0, shift, log_variance)
    return slope


@triton.jit
def error_of(
    said, x0, given, of_data, of_noise, block, skip, row, row_exists, key, seed, stream, sample,
    PER_SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, PARTIAL: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """prediction - (of_x0 x0 + of_noise eps)."""
    target = of_data.to(x0.dtype) * x0
    # Of a network that predicts the data, the target has no noise.
    if any_of(of_noise != 0.0):
        if given is not None:
            noise = given
        else:
            words = words_of_rows(key, seed, stream, sample, row, row_exists, PER_SAMPLE)
            noise = values_of_tile(block, skip, words, CHANNELS_LAST, PARTIAL, A, B, ITEM, False).to(x0.dtype)
        target = multiply_add(of_noise.to(x0.dtype), noise, target)
    return said - target


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=["index"])
def loss_kernel(
    output, x0, noise, loss, table, index, table_rows: tl.int64,
    key, seed: tl.int64, stream: tl.int64, sample: tl.int64, rows: tl.int64, height: tl.int64, width: tl.int64,
    LEARNED: tl.constexpr, WHOLE: tl.constexpr, PER_SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PARTIAL: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The sums of tiles; where a tile is a WHOLE row, the mean."""
    at, inside, row, row_exists, block, skip = place(rows, height, width, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIT)
    of_row = rows_of_tile(table, index, table_rows, row, row_exists, rows, 8, CHANNELS_LAST, A)
    at_prediction = at
    if LEARNED:
        at_prediction, apart = place_of_pairs(row, height, width, CHANNELS_LAST, A, B, ITEM, UNIT)
    # What is read in any case comes first, so that it does not wait for coefficients.
    said = load(output + at_prediction, inside)
    bound = coefficient(table, index, of_row, None, _BOUND_WEIGHT)
    true = coefficient(table, index, of_row, None, _POSTERIOR)
    is_first = (bound != 0.0) & (true == float("-inf"))
    of_data = coefficient(table, index, of_row, None, _OF_X0)
    # A target that is noise alone needs no data, and reading it would take a third of the time.
    data = load(x0 + at, inside & ((of_data != 0.0) | is_first))
    given = None if noise is None else load(noise + at, inside)
    if LEARNED:
        place_in_range = load(output + (at_prediction + apart), inside & (bound != 0.0))
    error = error_of(
        said, data, given, of_data, coefficient(table, index, of_row, None, _OF_NOISE), block, skip, row, row_exists,
        key, seed, stream, sample, PER_SAMPLE, CHANNELS_LAST, PARTIAL, A, B, ITEM,
    )  # fmt: skip
    term = coefficient(table, index, of_row, None, _WEIGHT).to(data.dtype) * (error * error)
    if any_of(bound != 0.0):
        log_variance = tl.zeros_like(data) + coefficient(table, index, of_row, None, _MIDDLE).to(data.dtype)
        if LEARNED:
            of_place = coefficient(table, index, of_row, None, _HALF_RANGE).to(data.dtype)
            log_variance = multiply_add(of_place, place_in_range, log_variance)
        shift = coefficient(table, index, of_row, None, _MOVED).to(data.dtype) * error
        gap = log_variance - tl.where(is_first, 0.0, true).to(data.dtype)
        square = shift * shift
        divergence = (gap - 1.0) + exponential(-gap) + square * exponential(-log_variance)
        divergence = divergence * 0.5
        if any_of(is_first):
            divergence = tl.where(is_first, decoder_nll(data, shift, log_variance), divergence)
        term = tl.where(bound != 0.0, multiply_add(bound.to(data.dtype), divergence, term), term)
    term = tl.where(inside, term, 0.0)
    total = tl.sum(term, axis=1, keep_dims=True)
    if CHANNELS_LAST:
        total = tl.sum(total, axis=0, keep_dims=True)
    if WHOLE:
        total = total.to(tl.float64) / (height * width * UNIT).to(tl.float64)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    tl.store(loss + row * tiles + tile, total.to(loss.dtype.element_ty), row_exists)


@triton.jit(do_not_specialize=["pieces", "elements"])
def mean_kernel(x, mean, pieces: tl.int64, elements: tl.int64, SIZE: tl.constexpr):
    """The sum of a row's pieces, in float64, by the elements: lanes each add up theirs, then all are added up."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    partial = tl.zeros((SIZE,), tl.float64)
    for first in range(0, pieces, SIZE):
        partial += tl.load(x + row * pieces + first + lane, first + lane < pieces, other=0.0).to(tl.float64)
    total = tl.sum(partial, axis=0) / elements.to(tl.float64)
    tl.store(mean + row, total.to(mean.dtype.element_ty))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def loss_backward_kernel(
    grad_loss, output, x0, noise, grad_output, table, index, table_rows: tl.int64,
    key, seed: tl.int64, stream: tl.int64, sample: tl.int64, rows: tl.int64, height: tl.int64, width: tl.int64,
    LEARNED: tl.constexpr, PER_SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PARTIAL: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    at, inside, row, row_exists, block, skip = place(rows, height, width, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIT)
    of_row = rows_of_tile(table, index, table_rows, row, row_exists, rows, 8, CHANNELS_LAST, A)
    at_prediction = at
    if LEARNED:
        at_prediction, apart = place_of_pairs(row, height, width, CHANNELS_LAST, A, B, ITEM, UNIT)
    said = load(output + at_prediction, inside)
    scale = load(grad_loss + row, row_exists)
    of_data = coefficient(table, index, of_row, None, _OF_X0)
    is_read = of_data != 0.0
    if LEARNED:
        bound = coefficient(table, index, of_row, None, _BOUND_WEIGHT)
        true = coefficient(table, index, of_row, None, _POSTERIOR)
        is_first = (bound != 0.0) & (true == float("-inf"))
        is_read = is_read | is_first
        place_in_range = load(output + (at_prediction + apart), inside & (bound != 0.0))
    data = load(x0 + at, inside & is_read)
    given = None if noise is None else load(noise + at, inside)
    error = error_of(
        said, data, given, of_data, coefficient(table, index, of_row, None, _OF_NOISE),
        block, skip, row, row_exists, key, seed, stream, sample, PER_SAMPLE, CHANNELS_LAST, PARTIAL, A, B, ITEM,
    )  # fmt: skip
    elements = (height * width * UNIT).to(data.dtype)
    scale = scale / elements if data.dtype == tl.float64 else tl.div_rn(scale, elements)
    grad = scale * (coefficient(table, index, of_row, None, _WEIGHT).to(data.dtype) * 2.0) * error
    tl.store(grad_output + at_prediction, grad.to(grad_output.dtype.element_ty), inside)
    if LEARNED:
        grad = tl.zeros_like(error)
        if any_of(bound != 0.0):
            of_place = coefficient(table, index, of_row, None, _HALF_RANGE).to(data.dtype)
            center = coefficient(table, index, of_row, None, _MIDDLE).to(data.dtype)
            log_variance = multiply_add(of_place, place_in_range, center)
            shift = coefficient(table, index, of_row, None, _MOVED).to(data.dtype) * error
            gap = log_variance - tl.where(is_first, 0.0, true).to(data.dtype)
            slope = ((1.0 - exponential(-gap)) - shift * shift * exponential(-log_variance)) * 0.5
            if any_of(is_first):
                slope = tl.where(is_first, decoder_slope(data, shift, log_variance), slope)
            grad = tl.where(bound != 0.0, scale * bound.to(data.dtype) * of_place * slope, 0.0)
        tl.store(grad_output + (at_prediction + apart), grad.to(grad_output.dtype.element_ty), inside)


def denoising_loss(
    output: Tensor, x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, noise: Tensor | None = None
) -> Tensor:
    memory_format = kept_format(output, x0)
    # Which threads add up what depends on how wide the accesses are, and that on the addresses.
    output, x0, noise = (
        x if x is None or x.data_ptr() % 16 == 0 else x.clone() for x in in_format(memory_format, output, x0, noise)
    )
    loss = x0.new_empty(x0.shape[0], dtype=torch.float64 if x0.dtype == torch.float64 else torch.float32)
    if x0.numel() == 0:
        return loss.fill_(math.nan)
    work, pieces = cut_in_format(x0, memory_format), loss
    if work.tiles_per_row > 1:
        pieces = loss.new_empty(work.rows, work.tiles_per_row)
    *words, per_sample = key_arguments(key, x0)
    with device_of(x0):
        loss_kernel[work.grid](
            output, x0, noise, pieces, *table_arguments(table, t, x0), *words, work.rows, work.height, work.width,
            LEARNED=output.shape != x0.shape, WHOLE=pieces is loss, PER_SAMPLE=per_sample, **work.constants,
        )  # fmt: skip
        if pieces is not loss:
            mean_kernel[(work.rows,)](
                pieces, loss, work.tiles_per_row, x0.numel() // work.rows, SIZE=_PIECES, enable_fp_fusion=False
            )
    return loss


def denoising_loss_backward(
    grad_loss: Tensor,
    output: Tensor,
    x0: Tensor,
    table: Tensor,
    t: Tensor | None,
    key: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    memory_format = kept_format(output, x0)
    output, x0, noise = in_format(memory_format, output, x0, noise)
    grad_output = torch.empty_like(output)
    if x0.numel():
        work = cut_in_format(x0, memory_format)
        *words, per_sample = key_arguments(key, x0)
        with device_of(x0):
            loss_backward_kernel[work.grid](
                grad_loss.contiguous(), output, x0, noise, grad_output, *table_arguments(table, t, x0), *words,
                work.rows, work.height, work.width,
                LEARNED=output.shape != x0.shape, PER_SAMPLE=per_sample, **work.constants,
            )  # fmt: skip
    return grad_output
