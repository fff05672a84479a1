"""How attention is cut into Triton programs, and what its kernels, forward and backward, have in common.

Kernels compute with powers of two, and a head is two of them where that pads it less: 40 channels are 32 and 8, the 8
padded to 16. Of a head too wide for a GPU's registers the logits are summed up in chunks of channels, and the results
divided among programs.

The cut depends on the size of a head and the type alone, so that neither the batch nor the tokens change the order of a
query's sums.
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

# The least that a dot product of tiles adds up.
_LEAST = 16
# No tile is longer, in tokens or in channels.
_LONGEST = 1024


class Tiles(NamedTuple):
    """What a kernel is compiled for: queries x keys of a tile, and how many warps and tiles in flight it takes."""

    queries: int
    keys: int
    warps: int
    stages: int


class Cut(NamedTuple):
    """How the channels of a head are cut."""

    # Into how many parts the results of a head are divided.
    parts: int
    constants: dict[str, Any]


def in_two(size: int) -> tuple[int, int]:
    """Two powers of two that hold so many channels in fewer lanes than one does, or one and 0."""
    whole = max(_LEAST, triton.next_power_of_2(size))
    main = whole // 2
    rest = max(_LEAST, triton.next_power_of_2(max(1, size - main)))
    return (main, rest) if main >= _LEAST and main + rest < whole else (whole, 0)


@functools.lru_cache(256)
def cut(size: int, chunk: int, part: int) -> Cut:
    """``chunk``: the channels that logits are summed up in, 0 for all at once; ``part``: the most of one program."""
    a, b = (chunk, 0) if chunk else in_two(size)
    wide, rest = in_two(size)
    if wide + rest > part:
        wide, rest = part, 0
    parts = 1 if rest else triton.cdiv(size, wide)
    return Cut(parts, {"SIZE": size, "CHUNKED": chunk > 0, "A": a, "B": b, "PA": wide, "PB": rest})


def has_warpgroups(tensor: Tensor) -> bool:
    """Whether the GPU that the tensor is on multiplies from shared memory, as H100 and B200 do, and not from registers.

    Without one, for the interpreter, it has.
    """
    return tensor.is_cpu or _has_warpgroups(tensor.get_device())


@functools.cache
def _has_warpgroups(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _channels_lie_together(tensor: Tensor) -> bool:
    return tensor.stride(3) == 1 or tensor.shape[3] == 1


def described(tensors: dict[str, Tensor], **tokens: int) -> tuple[list[int], dict[str, Any]]:
    """How kernels find their way in tensors that are readable; ``tokens``: how many there are, by the kernel's names.

    Returns: of each tensor, the steps from one sample, head, and token or channel to the next, then the numbers of
    tokens, all in units; and the constants: UNIT, of steps, NAME_UNIT, of each number of tokens, and NAME_LAYOUT, of
    each tensor. The compiler reads and writes as many elements at once as it knows to lie at multiples of that.

    A layout is the sum of 1, if the tokens lie side by side and not the channels, and 2, if steps within a tile need 64
    bits, which take twice the registers.
    """
    steps: list[int] = []
    constants: dict[str, Any] = {}
    width = 1
    for name, tensor in tensors.items():
        tokens_first = not _channels_lie_together(tensor)
        # A step that is never taken divides everything.
        steps += [0 if tensor.shape[i] == 1 else tensor.stride(i) for i in (0, 1, 3 if tokens_first else 2)]
        constants[f"{name.upper()}_LAYOUT"] = tokens_first + 2 * (steps[-1] * _LONGEST >= 1 << 31)
        if tokens_first:
            width = 16 // tensor.element_size()
    constants["UNIT"] = unit = math.gcd(16 // tensor.element_size(), *steps)
    arguments = [step // unit for step in steps]
    for name, number in tokens.items():
        constants[f"{name.upper()}_UNIT"] = unit = math.gcd(width, number)
        arguments.append(number // unit)
    return arguments, constants


@triton.jit
def plane(x, sample, head, of_sample, of_head, UNIT: tl.constexpr):
    """Where a head of a sample begins."""
    return x + (sample * of_sample + head * of_head) * UNIT


@triton.jit
def pointers(
    x, step, first, channel, T: tl.constexpr, W: tl.constexpr, UNIT: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """Of a tile of T tokens and W channels."""
    tokens = tl.arange(0, T)[:, None]
    channels = tl.arange(0, W)[None, :]
    # What changes from tile to tile is one number; the rest is worked out once.
    step = step.to(tl.int64) * UNIT
    small = step if LAYOUT >= 2 else step.to(tl.int32)
    if LAYOUT % 2:
        return x + (channel * step + first) + (channels * small + tokens)
    return x + (first * step + channel) + (tokens * small + channels)


@triton.jit
def inside(
    first, tokens, channel, T: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, SOME_TOKENS: tl.constexpr,
    SOME_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile exist, if not all tokens or not all channels of it need to."""
    exists = (first + tl.arange(0, T) < tokens)[:, None]
    if SOME_CHANNELS:
        known = (channel + tl.arange(0, W) < SIZE)[None, :]
        exists = (exists & known) if SOME_TOKENS else known
    return exists


@triton.jit
def tile(
    x, step, first, tokens, channel, T: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr,
    LAYOUT: tl.constexpr, SOME_TOKENS: tl.constexpr, SOME_CHANNELS: tl.constexpr,
):  # fmt: skip
    """T tokens from the first on and W channels, 0 where there are none."""
    at = pointers(x, step, first, channel, T, W, UNIT, LAYOUT)
    if SOME_TOKENS or SOME_CHANNELS:
        return tl.load(at, inside(first, tokens, channel, T, W, SIZE, SOME_TOKENS, SOME_CHANNELS), other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(
    x, step, first, tokens, channel, value, SIZE: tl.constexpr, UNIT: tl.constexpr, LAYOUT: tl.constexpr,
    SOME_CHANNELS: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = value.shape[0]
    W: tl.constexpr = value.shape[1]
    at = pointers(x, step, first, channel, T, W, UNIT, LAYOUT)
    exists = inside(first, tokens, channel, T, W, SIZE, True, SOME_CHANNELS)
    tl.store(at, value.to(x.dtype.element_ty), exists)


@triton.jit
def add_products(a, b, total):
    """total + a b: half types on tensor cores, the others to the full precision of the type."""
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
