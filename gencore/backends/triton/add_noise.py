"""The forward process of diffusion models. What the kernel computes is said in csrc/include/gencore/add_noise.h."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import in_format, kept_format
from gencore.backends.triton._coefficients import coefficient, coefficient_arguments, cut_in_format, rows_of_tile
from gencore.backends.triton._tiles import device_of, key_arguments, place, values_of_tile
from gencore.backends.triton.noise import multiply_add, words_of_rows
from gencore.backends.triton.reparameterize import load

_VALUES = ["table_rows", "alpha", "sigma", "seed", "stream", "sample", "rows", "height", "width"]


@triton.jit(do_not_specialize=_VALUES)
def add_noise_kernel(
    x0, x_t, eps, table, index, table_rows: tl.int64, alpha: tl.float64, sigma: tl.float64,
    key, seed: tl.int64, stream: tl.int64, sample: tl.int64, rows: tl.int64, height: tl.int64, width: tl.int64,
    PER_SAMPLE: tl.constexpr, CHANNELS_LAST: tl.constexpr, PARTIAL: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    at, inside, row, row_exists, block, skip = place(rows, height, width, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIT)
    of_row = rows_of_tile(table, index, table_rows, row, row_exists, rows, 2, CHANNELS_LAST, A)
    words = words_of_rows(key, seed, stream, sample, row, row_exists, PER_SAMPLE)
    data = load(x0 + at, inside)
    of_data = coefficient(table, index, of_row, alpha, 0).to(data.dtype)
    of_noise = coefficient(table, index, of_row, sigma, 1).to(data.dtype)
    noise = values_of_tile(block, skip, words, CHANNELS_LAST, PARTIAL, A, B, ITEM, False).to(data.dtype)
    value = multiply_add(of_noise, noise, of_data * data)
    tl.store(x_t + at, value.to(x_t.dtype.element_ty), inside)
    if eps is not None:
        tl.store(eps + at, noise.to(eps.dtype.element_ty), inside)


def add_noise(
    x0: Tensor, table: Tensor, t: Tensor | None, key: Tensor, with_noise: bool, x_t: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``x_t``: where to write to, with the strides of ``x0`` in its format."""
    memory_format = kept_format(x0)
    (x0,) = in_format(memory_format, x0)
    x_t = torch.empty_like(x0) if x_t is None else x_t
    noise = torch.empty_like(x0) if with_noise else None
    if x0.numel():
        work = cut_in_format(x0, memory_format)
        *words, per_sample = key_arguments(key, x0)
        with device_of(x0):
            add_noise_kernel[work.grid](
                x0, x_t, noise, *coefficient_arguments(table, t, x0), *words, work.rows, work.height, work.width,
                PER_SAMPLE=per_sample, **work.constants,
            )  # fmt: skip
    return x_t, noise
