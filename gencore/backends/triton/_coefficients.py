"""Coefficients that differ from sample to sample: rows of float64, csrc's Coefficients.

A kernel has for them the arguments `table`, `index`, `table_rows`, whose rows are read when it runs, so that a captured
graph takes what is there when it is replayed. Where a single row may be on the CPU, it has an argument of float64 for
each column too, in which that row travels: nothing is copied to the device, nothing waits for it.

In a kernel a coefficient is a column with a value for each row of the tile, or with one for all. Whether it is 0 is
asked in float64; then it is rounded once, to the type of the arithmetic.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.triton._tiles import Cut, cut


def coefficient_arguments(table: Tensor, index: Tensor | None, tensor: Tensor) -> tuple[Any, ...]:
    """`table`, `index`, `table_rows` and the columns, as a kernel for ``tensor`` takes them."""
    if index is None and len(table) == 1 and table.is_cpu:
        return None, None, 1, *table[0].tolist()
    return *table_arguments(table, index, tensor), *[0.0] * table.shape[1]


def table_arguments(table: Tensor, index: Tensor | None, tensor: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """`table`, `index` and `table_rows` of a kernel that reads every row when it runs."""
    device = tensor.device
    if index is not None:
        index = index.to(device, non_blocking=True).contiguous()
    return table.to(device, non_blocking=True).contiguous(), index, len(table)


def cut_in_format(tensor: Tensor, memory_format: torch.memory_format) -> Cut:
    rows = tensor.shape[0]
    channels = 0 if memory_format is torch.contiguous_format else tensor.shape[1]
    return cut(rows, tensor.numel() // rows, channels, tensor.element_size())


@triton.jit
def rows_of_tile(
    table, index, table_rows, row, row_exists, rows,
    COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Where the coefficients of this tile's rows begin, and which of these there are."""
    start, exists = row, row_exists
    if table is not None:
        if CHANNELS_LAST or A == 1:
            # The same row as a scalar, which a thread reads once; a tile of one row it may read for each element.
            row = tl.program_id(1) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
            exists = row < rows
        if index is not None:
            row = tl.load(index + row, exists, other=0)
            exists = (row >= 0) & (row < table_rows)
        else:
            row = tl.where(table_rows == 1, 0, row)
        start = table + row * COLUMNS
    return start, exists


@triton.jit
def coefficient(table, index, rows_of, value, COLUMN: tl.constexpr):
    """A column of the rows that :func:`rows_of_tile` found; NaN where the index is not one of the table."""
    start, exists = rows_of
    if table is None:
        # To the interpreter this is a float, which it would round to float32 if it had another name.
        found = tl.full((1, 1), value, tl.float64)
    else:
        if index is not None:
            found = tl.load(start + COLUMN, exists, other=float("nan"))
        else:
            found = tl.load(start + COLUMN, exists, other=0.0)
        if not start.type.is_block():
            found = tl.full((1, 1), found, tl.float64)
    return found


@triton.jit
def any_of(condition):
    """Whether it holds for any row of this tile, as a scalar to branch on."""
    return tl.max(condition.to(tl.int32)) != 0
