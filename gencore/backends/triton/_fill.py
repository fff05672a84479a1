"""What the ops that fill a tensor with noise share."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import memory_format_of
from gencore.backends.triton._tiles import cut, device_of, key_arguments, place, values_of_tile
from gencore.backends.triton.noise import words_of_rows


@triton.jit(do_not_specialize=["seed", "stream", "sample", "rows", "height", "width"])
def fill_kernel(
    out, key, seed: tl.int64, stream: tl.int64, sample: tl.int64, rows: tl.int64, height: tl.int64, width: tl.int64,
    PER_SAMPLE: tl.constexpr, UNIFORM: tl.constexpr, CHANNELS_LAST: tl.constexpr, PARTIAL: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    at, inside, row, row_exists, block, skip = place(rows, height, width, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIT)
    words = words_of_rows(key, seed, stream, sample, row, row_exists, PER_SAMPLE)
    values = values_of_tile(block, skip, words, CHANNELS_LAST, PARTIAL, A, B, ITEM, UNIFORM)
    tl.store(out + at, values.to(out.dtype.element_ty), inside)


def fill(out: Tensor, key: Tensor, uniform: bool) -> None:
    dense, channels = out, 0
    if not out.is_contiguous():
        if memory_format_of(out) is torch.contiguous_format:
            dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        else:
            channels = out.shape[1]
    if dense.numel():
        rows = dense.shape[0]
        work = cut(rows, dense.numel() // rows, channels, dense.element_size())
        *words, per_sample = key_arguments(key, out)
        with device_of(out):
            fill_kernel[work.grid](
                dense, *words, work.rows, work.height, work.width,
                PER_SAMPLE=per_sample, UNIFORM=uniform, **work.constants,
            )  # fmt: skip
        if dense is not out:
            out.copy_(dense)
