"""How the work of an op is cut into the tiles of Triton programs, and where a tile lies in its tensor.

A row is one sample: a matrix of `height` x `width` in memory. In logical order it is 1 x elements, in channels_last
pixels x channels. A tile of the first kind is several rows, or a piece of one, or both; one of the second kind is some
pixels and channels of one row. Every tile is made of items: elements that stay with one thread, because they are in one
noise block, or in two.

The cut depends on the size of a row alone, so what is summed over tiles is summed in an order of which batch, key and
addresses change nothing.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.triton.noise import values_of_blocks

# Elements of a tile: two accesses of 16 bytes for each of 128 threads in float32, one in the half types.
_TILE = 1024
# A row's part of a tile is at least as many items, so that neighbours read a whole line.
_LEAST_ITEMS = 32
_MOST_CHANNELS = 64
_GRID_LIMIT = 65535


class Cut(NamedTuple):
    """The launch arguments that say how a tensor is cut; :func:`place` reads them."""

    grid: tuple[int, int, int]
    # Integers that change from shape to shape without a new compilation.
    rows: int
    height: int
    width: int
    # What kernels are compiled for.
    constants: dict[str, Any]
    tiles_per_row: int


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


# Most calls repeat a shape, and working out its cut takes as long as launching a kernel.
@functools.lru_cache(1024)
def cut(rows: int, elements: int, channels: int, element_size: int) -> Cut:
    """The cut of tensors of `rows` rows; `channels` is 0 where elements lie in logical order."""
    if channels:
        pixels, item = elements // channels, 4
        groups, b = _divide_up(pixels, item), min(_power_of_two(channels), _MOST_CHANNELS)
        a = min(_power_of_two(groups), _TILE // item // b)
        tiles_per_row = _divide_up(groups, a) * _divide_up(channels, b)
        height, width, row_groups, partial = pixels, channels, rows, pixels % 4 != 0
    else:
        # An access of 16 bytes is two noise blocks in the half types.
        item = 8 if element_size == 2 and elements % 8 == 0 else 4
        items = _divide_up(elements, item)
        b = _items_per_tile(items, _TILE // item)
        a = _TILE // item // b
        tiles_per_row = _divide_up(items, b)
        height, width, row_groups, partial = 1, elements, _divide_up(rows, a), False
    # The compiler reads and writes as many elements at once as it knows to lie at multiples of that.
    unit = next(unit for unit in (max(4, 16 // element_size), 4, 1) if width % unit == 0)
    over_limit = _divide_up(row_groups, _GRID_LIMIT)
    constants = {
        "CHANNELS_LAST": channels != 0, "PARTIAL": partial, "A": a, "B": b, "ITEM": item, "UNIT": unit,
        "num_warps": max(1, min(4, a * b // 32)), "enable_fp_fusion": False,
    }  # fmt: skip
    grid = tiles_per_row, _divide_up(row_groups, max(over_limit, 1)), over_limit
    return Cut(grid, rows, height, width // unit, constants, tiles_per_row)


def _items_per_tile(items: int, most: int) -> int:
    """The items of one row in a tile: a power of two that leaves few lanes idle at the row's end."""
    largest = min(_power_of_two(items), most)
    best = largest
    for candidate in (largest // 2, largest // 4):
        if candidate >= _LEAST_ITEMS and 1.1 * _padded(items, candidate) < _padded(items, best):
            best = candidate
    return best


def _padded(items: int, size: int) -> int:
    return _divide_up(items, size) * size


def key_arguments(key: Tensor, tensor: Tensor) -> tuple[Tensor | None, int, int, int, bool]:
    """A key as kernels take it: words on the device, or the three words themselves; and whether it names each sample.

    The words of a key on the CPU travel with the launch: nothing is copied to the device, nothing waits for it.
    """
    if key.dim() == 1 and key.is_cpu:
        seed, stream, sample = key.tolist()
        return None, seed, stream, sample, False
    if key.device != tensor.device:
        key = key.to(tensor.device, non_blocking=True)
    return halves(key), 0, 0, 0, key.dim() == 2


def halves(key: Tensor) -> Tensor:
    """The words of a key as kernels read them."""
    return key.contiguous().view(torch.int32)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, so it must be the tensor's."""
    if tensor.is_cpu or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.get_device())


@triton.jit
def place(
    rows, height, width, CHANNELS_LAST: tl.constexpr, PARTIAL: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ITEM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where this program's tile lies.

    Returns: the offsets of its elements and which are inside the tensor; the rows and which of them exist; for each
    item its noise block in the row and, for items that begin inside a block, the number of their first value in it.
    """
    width = width.to(tl.int64) * UNIT
    group = tl.program_id(1) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if CHANNELS_LAST:
        channel_tiles = tl.cdiv(width, B).to(tl.int32)
        tile = tl.program_id(0) // channel_tiles
        first_channel = (tl.program_id(0) - tile * channel_tiles).to(tl.int64) * B
        first = tile.to(tl.int64) * A
        row = group + tl.arange(0, 1)[:, None]
        row_exists = row < rows
        pixel = first * ITEM + tl.arange(0, A * ITEM)[:, None]
        channel = first_channel + tl.arange(0, B)[None, :]
        at = row * (width * height) + pixel * width + channel
        inside = (pixel < height) & (channel < width) & row_exists
        # Channel c begins at element c * pixels.
        excess = channel * (height & 3)
        block = (channel * (height >> 2) + (excess >> 2) + first).to(tl.uint32) + tl.arange(0, A)[:, None].to(tl.uint32)
        skip = (excess & 3).to(tl.int32)
    else:
        row = group * A + tl.arange(0, A)[:, None]
        row_exists = row < rows
        first = tl.program_id(0).to(tl.int64) * B
        element = first * ITEM + tl.arange(0, B * ITEM)[None, :]
        at = row * width + element
        inside = (element < width) & row_exists
        block = (first * (ITEM // 4)).to(tl.uint32) + tl.arange(0, B)[None, :].to(tl.uint32) * (ITEM // 4)
        skip = block
    return at, inside, row, row_exists, block, skip


@triton.jit
def place_of_pairs(
    row, height, width, CHANNELS_LAST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ITEM: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Where this program's tile lies in a tensor that has two values for each element, in twice the channels.

    Returns: the offsets of the first values, and how far from them the second ones are.
    """
    width = width.to(tl.int64) * UNIT
    if CHANNELS_LAST:
        channel_tiles = tl.cdiv(width, B).to(tl.int32)
        tile = tl.program_id(0) // channel_tiles
        first_channel = (tl.program_id(0) - tile * channel_tiles).to(tl.int64) * B
        pixel = tile.to(tl.int64) * (A * ITEM) + tl.arange(0, A * ITEM)[:, None]
        at = row * (2 * width * height) + pixel * (2 * width) + (first_channel + tl.arange(0, B)[None, :])
    else:
        at = row * (2 * width) + (tl.program_id(0).to(tl.int64) * (B * ITEM) + tl.arange(0, B * ITEM)[None, :])
    return at, width


@triton.jit
def values_of_tile(
    block, skip, words, CHANNELS_LAST: tl.constexpr, PARTIAL: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    ITEM: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """The noise of a tile whose items begin with the blocks `block`, float32."""
    v0, v1, v2, v3 = values_of_blocks(block, words, UNIFORM)
    if PARTIAL:
        v4, v5, v6, _ = values_of_blocks(block + 1, words, UNIFORM)
        first, second, third = skip == 1, skip == 2, skip == 3
        v0 = tl.where(first, v1, tl.where(second, v2, tl.where(third, v3, v0)))
        v1 = tl.where(first, v2, tl.where(second, v3, tl.where(third, v4, v1)))
        v2 = tl.where(first, v3, tl.where(second, v4, tl.where(third, v5, v2)))
        v3 = tl.where(first, v4, tl.where(second, v5, tl.where(third, v6, v3)))
    if ITEM == 8:
        v4, v5, v6, v7 = values_of_blocks(block + 1, words, UNIFORM)
        v0, v1, v2, v3 = tl.join(v0, v4), tl.join(v1, v5), tl.join(v2, v6), tl.join(v3, v7)
    # What is joined first is the higher digit of an element's number in its item.
    values = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    if CHANNELS_LAST:
        # Memory has the channels of one pixel side by side, an item four pixels of one channel.
        values = tl.reshape(tl.permute(values, (0, 2, 3, 1)), (A * ITEM, B))
    else:
        values = tl.reshape(values, (A, B * ITEM))
    return values
