"""Bias, activation, gain and clamp. What the kernels compute is said in csrc/include/gencore/bias_act.h.

A tensor is a matrix whose rows are planes of a channel, or, where those are single pixels as in channels_last, whose
columns are channels. A program takes a few tiles of it, one after another: along a row, or down the columns, so that it
adds up what is summed in its registers. The cut depends on the shape alone, and so does the order of a sum.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.activations import form_of
from gencore.backends.layout import channel_sums, in_format, planes_of, suggested_format
from gencore.backends.triton._activations import first_of, second_of, value_of
from gencore.backends.triton._group_norm import aligned
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.reparameterize import load

_TILE = 1024
_MOST_ROUNDS = 16
# So many programs fill a GPU: where there are more, each takes more tiles.
_ENOUGH = 2048
_SUMMED = 256

_NUMBERS = ["slope", "factor", "lower", "upper"]
_SIZES = ["rows", "width", "channels"]


class _Cut(NamedTuple):
    programs: int
    # Where sums of pieces lie: so many for each channel, one behind another, and of so many groups of channels.
    groups: int
    pieces: int
    sizes: tuple[int, int, int]
    constants: dict[str, Any]


@functools.lru_cache(1024)
def _cut(outer: int, channels: int, inner: int, element_size: int) -> _Cut:
    columns = inner == 1 and channels > 1
    rows, width = (outer, channels) if columns else (outer * channels, inner)
    b = min(triton.next_power_of_2(width), 128 if columns else _TILE)
    a = min(triton.next_power_of_2(rows), _TILE // b)
    down, across = triton.cdiv(rows, a), triton.cdiv(width, b)
    along = down if columns else across
    rounds = 1
    while rounds < min(_MOST_ROUNDS, along) and down * across > _ENOUGH * rounds:
        rounds *= 2
    pieces = triton.cdiv(along, rounds)
    # The compiler reads and writes as many elements at once as it knows to lie at multiples of that.
    unit = next(unit for unit in (16 // element_size, 4, 2, 1) if width % unit == 0)
    constants = {
        "COLUMNS": columns, "A": a, "B": b, "ROUNDS": rounds, "UNIT": unit,
        "num_warps": max(1, min(4, a * b // 128)), "enable_fp_fusion": False,
    }  # fmt: skip
    programs = pieces * (across if columns else down)
    groups, of_channel = (pieces, 1) if columns else (outer, pieces)
    return _Cut(programs, groups, of_channel, (rows, width // unit, channels), constants)


@triton.jit
def place(rows, width, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr):
    """The rows and columns of this program's first tile, and the number of its piece, of how many."""
    program = tl.program_id(0)
    if COLUMNS:
        pieces = tl.cdiv(rows, A * ROUNDS).to(tl.int32)
        other = program // pieces
        piece = program - other * pieces
        row = piece.to(tl.int64) * (A * ROUNDS) + tl.arange(0, A)[:, None]
        column = other.to(tl.int64) * B + tl.arange(0, B)[None, :]
    else:
        pieces = tl.cdiv(width, B * ROUNDS).to(tl.int32)
        other = program // pieces
        piece = program - other * pieces
        row = other.to(tl.int64) * A + tl.arange(0, A)[:, None]
        column = piece.to(tl.int64) * (B * ROUNDS) + tl.arange(0, B)[None, :]
    return row, column, piece, pieces


@triton.jit
def of_channels(values, x, row, column, rows, width, channels, COLUMNS: tl.constexpr):
    """The values of a tile's channels: a column or a row of them."""
    if COLUMNS:
        value = tl.load(values + column, column < width, other=0.0)
    else:
        value = tl.load(values + row % channels, row < rows, other=0.0)
    return value.to(tl.float64) if x.dtype.element_ty == tl.float64 else value.to(tl.float32)


@triton.jit
def number(value, t):
    """An argument of the launch in the type of t; the interpreter has it as a float of Python's."""
    return tl.full((1, 1), value, t.dtype)


@triton.jit
def reaches(y, lower, upper):
    """Where y has reached a bound, if there is one: no change of its argument changes it."""
    return ((y >= upper) & (upper < float("inf"))) | ((y <= lower) & (lower > float("-inf")))


@triton.jit(do_not_specialize=[*_NUMBERS, *_SIZES])
def bias_act_kernel(
    x, y, bias, slope: tl.float64, factor: tl.float64, lower: tl.float64, upper: tl.float64,
    rows: tl.int64, width: tl.int64, channels: tl.int64,
    FUNCTION: tl.constexpr, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    width = width * UNIT
    row, column, _, _ = place(rows, width, COLUMNS, A, B, ROUNDS)
    for _ in range(ROUNDS):
        inside = (row < rows) & (column < width)
        t = load(x + row * width + column, inside)
        if bias is not None:
            t += of_channels(bias, x, row, column, rows, width, channels, COLUMNS)
        value = number(factor, t) * value_of(t, x, number(slope, t), FUNCTION)
        value = tl.minimum(number(upper, t), value, propagate_nan=tl.PropagateNan.ALL)
        value = tl.maximum(number(lower, t), value, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + row * width + column, value.to(y.dtype.element_ty), inside)
        if COLUMNS:
            row += A
        else:
            column += B


@triton.jit(do_not_specialize=[*_NUMBERS, *_SIZES])
def derivative_kernel(
    grad, at, direction, product, second, partial, bias, shift,
    slope: tl.float64, factor: tl.float64, lower: tl.float64, upper: tl.float64,
    rows: tl.int64, width: tl.int64, channels: tl.int64,
    FUNCTION: tl.constexpr, BOUNDED: tl.constexpr, AT_OUTPUT: tl.constexpr, TWICE: tl.constexpr,
    COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """BiasActBackward, or TWICE, BiasActDoubleBackward: ``partial`` gets the sums of this program's tiles."""
    width = width * UNIT
    row, column, piece, pieces = place(rows, width, COLUMNS, A, B, ROUNDS)
    first_row, first_column = row, column
    dtype = tl.float64 if at.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((A, B), dtype)
    for _ in range(ROUNDS):
        inside = (row < rows) & (column < width)
        offset = row * width + column
        t = load(at + offset, inside)
        if bias is not None:
            t += of_channels(bias, at, row, column, rows, width, channels, COLUMNS)
        w = tl.zeros((A, B), dtype)
        if direction is not None:
            w += load(direction + offset, inside)
        if shift is not None:
            w += of_channels(shift, at, row, column, rows, width, channels, COLUMNS)
        own_slope, own_factor = number(slope, t), number(factor, t)
        result = own_factor * first_of(t, at, own_slope, FUNCTION) * w
        if TWICE:
            terms = own_factor * second_of(t, at, own_slope, FUNCTION) * load(grad + offset, inside) * w
        else:
            terms = result
        if BOUNDED:
            reached = t if AT_OUTPUT else own_factor * value_of(t, at, own_slope, FUNCTION)
            beyond = reaches(reached, number(lower, t), number(upper, t))
            result = tl.where(beyond, 0.0, result)
            terms = tl.where(beyond, 0.0, terms)
        if product is not None:
            tl.store(product + offset, result.to(product.dtype.element_ty), inside)
        if second is not None:
            tl.store(second + offset, terms.to(second.dtype.element_ty), inside)
        if partial is not None:
            sums += tl.where(inside, terms, 0.0)
        if COLUMNS:
            row += A
        else:
            column += B
    if partial is not None:
        if COLUMNS:
            total = tl.sum(sums, axis=0, keep_dims=True)
            tl.store(partial + piece * width + first_column, total, first_column < width)
        else:
            total = tl.sum(sums, axis=1, keep_dims=True)
            tl.store(partial + first_row * pieces + piece, total, first_row < rows)


@triton.jit(do_not_specialize=["groups", "pieces", "channels"])
def channels_kernel(partial, sums, groups: tl.int64, pieces: tl.int64, channels: tl.int64, SIZE: tl.constexpr):
    """The sums of a channel: the lanes each add up theirs in float64, then all are added up."""
    channel = tl.program_id(0).to(tl.int64)
    total = tl.zeros((SIZE,), tl.float64)
    for first in range(0, groups * pieces, SIZE):
        number = first + tl.arange(0, SIZE)
        group = number // pieces
        at = (group * channels + channel) * pieces + number - group * pieces
        total += tl.load(partial + at, number < groups * pieces, other=0.0).to(tl.float64)
    tl.store(sums + channel, tl.sum(total, axis=0).to(sums.dtype.element_ty))


def _cut_of(x: Tensor, memory_format: torch.memory_format, with_channels: bool) -> _Cut:
    if not with_channels:
        return _cut(1, 1, x.numel(), x.element_size())
    return _cut(*planes_of(x, memory_format), x.element_size())


def _dense(values: Tensor | None) -> Tensor | None:
    return values if values is None else values.contiguous()


def bias_act(
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float,
    gain: float,
    clamp: float | None,
    y: Tensor | None = None,
) -> Tensor:
    """``y``: where to write to, with the strides of ``x`` in its format."""
    memory_format = suggested_format(x)
    (x,) = in_format(memory_format, x)
    y = torch.empty_like(x) if y is None else y
    if x.numel():
        function, *numbers = form_of(activation, slope, gain, clamp)
        work = _cut_of(x, memory_format, bias is not None)
        with device_of(x):
            bias_act_kernel[(work.programs,)](
                x, y, _dense(bias), *numbers, *work.sizes, FUNCTION=function, **work.constants
            )
    return y


def bias_act_backward(
    grad: Tensor | None,
    at: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    activation: str,
    slope: float,
    gain: float,
    clamp: float | None,
    at_output: bool,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    memory_format = suggested_format(at)
    grad, at = in_format(memory_format, grad, at)
    product = torch.empty_like(at) if wanted[0] else None
    form = form_of(activation, slope, gain, clamp)
    values = None if at_output else bias, shift
    sums = _derivative(None, at, grad, (product, None), values, form, memory_format, at_output, wanted[1])
    return product, sums


def bias_act_double_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    direction: Tensor | None,
    shift: Tensor | None,
    activation: str,
    slope: float,
    gain: float,
    clamp: float | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    memory_format = suggested_format(x)
    grad, x, direction = in_format(memory_format, grad, x, direction)
    results = [torch.empty_like(x) if want else None for want in wanted[:2]]
    form = form_of(activation, slope, gain, clamp)
    sums = _derivative(grad, x, direction, results, (bias, shift), form, memory_format, False, wanted[2])
    return *results, sums


def _derivative(grad, at, direction, results, values, form, memory_format, at_output, with_sums):
    """Launches the kernel, and gives the sums over channels if they are wanted."""
    sums, partial = channel_sums(at) if with_sums else None, None
    if not at.numel():
        return sums if sums is None else sums.zero_()
    if with_sums:
        # Which threads add up what depends on how wide the accesses are, and that on the address.
        grad, at, direction = (None if tensor is None else aligned(tensor) for tensor in (grad, at, direction))
    function, *numbers = form
    work = _cut_of(at, memory_format, with_sums or any(value is not None for value in values))
    if with_sums:
        partial = sums.new_empty(work.groups * at.shape[1] * work.pieces)
    bounded = math.isfinite(form.lower) or math.isfinite(form.upper)
    with device_of(at):
        derivative_kernel[(work.programs,)](
            grad, at, direction, *results, partial, *map(_dense, values), *numbers, *work.sizes,
            FUNCTION=function, BOUNDED=bounded, AT_OUTPUT=at_output, TWICE=grad is not None, **work.constants,
        )  # fmt: skip
        if with_sums:
            channels_kernel[(at.shape[1],)](
                partial, sums, work.groups, work.pieces, at.shape[1], SIZE=_SUMMED, enable_fp_fusion=False
            )
    return sums
