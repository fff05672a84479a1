"""A step of any sampler. What the kernel computes is said in csrc/include/gencore/diffusion_step.h."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import in_format, kept_format
from gencore.backends.triton._coefficients import (
    any_of,
    coefficient,
    coefficient_arguments,
    cut_in_format,
    rows_of_tile,
)
from gencore.backends.triton._tiles import device_of, key_arguments, place, place_of_pairs, values_of_tile
from gencore.backends.triton.noise import exponential, multiply_add, words_of_rows
from gencore.backends.triton.reparameterize import load

_COLUMNS = [
    "of_output", "of_second", "predict_x", "predict_output", "limit", "x0_scale", "of_x", "direct", "of_x0",
    "of_history0", "of_history1", "of_noise", "log_scale", "log_scale_slope", "of_known", "known_noise",
]  # fmt: skip
_SIZES = ["seed", "stream", "sample", "rows", "height", "width"]


@triton.jit(do_not_specialize=["table_rows", *_COLUMNS, *_SIZES])
def step_kernel(
    x, output, second, history0, history1, known, mask, y, prediction, table, table_rows: tl.int64,
    of_output: tl.float64, of_second: tl.float64, predict_x: tl.float64, predict_output: tl.float64, limit: tl.float64,
    x0_scale: tl.float64, of_x: tl.float64, direct: tl.float64, of_x0: tl.float64, of_history0: tl.float64,
    of_history1: tl.float64, of_noise: tl.float64, log_scale: tl.float64, log_scale_slope: tl.float64,
    of_known: tl.float64, known_noise: tl.float64,
    key, seed: tl.int64, stream: tl.int64, sample: tl.int64, rows: tl.int64, height: tl.int64, width: tl.int64,
    LEARNED: tl.constexpr, SECOND_LEARNED: tl.constexpr, PER_SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PARTIAL: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    at, inside, row, row_exists, block, skip = place(rows, height, width, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIT)
    of_row = rows_of_tile(table, None, table_rows, row, row_exists, rows, 16, CHANNELS_LAST, A)
    # All that is read comes first, so that it waits neither for coefficients nor behind the noise.
    state = load(x + at, inside)
    if LEARNED or SECOND_LEARNED:
        at_pairs, apart = place_of_pairs(row, height, width, CHANNELS_LAST, A, B, ITEM, UNIT)
    if output is not None:
        said = load(output + (at_pairs if LEARNED else at), inside)
    if second is not None:
        also_said = load(second + (at_pairs if SECOND_LEARNED else at), inside)
    if history0 is not None:
        earlier0 = load(history0 + at, inside)
    if history1 is not None:
        earlier1 = load(history1 + at, inside)
    if known is not None:
        known_data = load(known + at, inside)
        is_known = load(mask + at, inside)
    noise_scale = coefficient(table, None, of_row, of_noise, 11)
    is_noised = noise_scale != 0.0
    wants_noise = is_noised
    if known is not None:
        noise_of_known = coefficient(table, None, of_row, known_noise, 15)
        wants_noise = is_noised | (noise_of_known != 0.0)
    if LEARNED:
        shift = coefficient(table, None, of_row, log_scale, 12)
        slope = coefficient(table, None, of_row, log_scale_slope, 13)
        is_scaled = is_noised & ((shift != 0.0) | (slope != 0.0))
        place_in_range = load(output + (at_pairs + apart), inside & is_scaled)

    value = coefficient(table, None, of_row, of_x, 6).to(state.dtype) * state
    if output is not None:
        guided = coefficient(table, None, of_row, of_output, 0).to(state.dtype) * said
        if second is not None:
            guided = multiply_add(coefficient(table, None, of_row, of_second, 1).to(state.dtype), also_said, guided)
        data = coefficient(table, None, of_row, predict_x, 2).to(state.dtype) * state
        data = multiply_add(coefficient(table, None, of_row, predict_output, 3).to(state.dtype), guided, data)
        # NaN is on neither side of the limit.
        most = coefficient(table, None, of_row, limit, 4).to(state.dtype)
        least = most * -1.0
        data = tl.where(data > most, most, data)
        data = tl.where(data < least, least, data)
        data = coefficient(table, None, of_row, x0_scale, 5).to(state.dtype) * data
        if prediction is not None:
            tl.store(prediction + at, data.to(prediction.dtype.element_ty), inside)
        value = multiply_add(coefficient(table, None, of_row, direct, 7).to(state.dtype), guided, value)
        value = multiply_add(coefficient(table, None, of_row, of_x0, 8).to(state.dtype), data, value)
    if history0 is not None:
        value = multiply_add(coefficient(table, None, of_row, of_history0, 9).to(state.dtype), earlier0, value)
    if history1 is not None:
        value = multiply_add(coefficient(table, None, of_row, of_history1, 10).to(state.dtype), earlier1, value)
    if known is not None:
        kept = coefficient(table, None, of_row, of_known, 14).to(state.dtype) * known_data

    if any_of(wants_noise):
        words = words_of_rows(key, seed, stream, sample, row, row_exists, PER_SAMPLE)
        noise = values_of_tile(block, skip, words, CHANNELS_LAST, PARTIAL, A, B, ITEM, False).to(state.dtype)
        scale = noise_scale.to(state.dtype)
        if LEARNED:
            # Where v was not read this is the exponential of 0, exactly 1.
            scale = scale * exponential(multiply_add(slope.to(state.dtype), place_in_range, shift.to(state.dtype)))
        value = tl.where(is_noised, multiply_add(scale, noise, value), value)
        if known is not None:
            noised = multiply_add(noise_of_known.to(state.dtype), noise, kept)
            kept = tl.where(noise_of_known != 0.0, noised, kept)
    if known is not None:
        value = multiply_add(is_known, kept, (1.0 - is_known) * value)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


def diffusion_step(
    x: Tensor,
    output: Tensor | None,
    second: Tensor | None,
    history0: Tensor | None,
    history1: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    key: Tensor,
    y: Tensor | None = None,
    prediction: Tensor | None = None,
) -> Tensor:
    """``y``, ``prediction``: where to write to, with the strides of ``x`` in its format."""
    memory_format = kept_format(x)
    x, *tensors = in_format(memory_format, x, output, second, history0, history1, known, mask)
    y = torch.empty_like(x) if y is None else y
    if x.numel() == 0:
        return y
    learned, second_learned = (tensor is not None and tensor.shape != x.shape for tensor in tensors[:2])
    work = cut_in_format(x, memory_format)
    table, _, *coefficients = coefficient_arguments(rows, None, x)
    *words, per_sample = key_arguments(key, x)
    with device_of(x):
        step_kernel[work.grid](
            x, *tensors, y, prediction, table, *coefficients, *words, work.rows, work.height, work.width,
            LEARNED=learned, SECOND_LEARNED=second_learned, PER_SAMPLE=per_sample, **work.constants,
        )  # fmt: skip
    return y
