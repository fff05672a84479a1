"""What the kernels of attention's second derivative and forward mode have in common: products of tensors that change.

A pair is a tensor and its change: q and dq, k and dk, v and dv, or the gradient of the result and nothing. Each of the
two is a view, a tuple: the tensor, where the head begins in it, and the step from token to token or channel to channel.
The layouts of both are one number, two bits for each. A tensor that is None is 0.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from gencore.backends.triton._attention import add_products, store_tile, tile


@triton.jit
def both(
    x, first, tokens, channel, T: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr,
    UNIT: tl.constexpr, LAYOUT: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """T tokens of a view: a tile of A channels, and one of the B that follow, if any."""
    some: tl.constexpr = (B == 0) and (SIZE % A != 0)
    begin = x[0] + x[1] * UNIT
    x0 = tile(begin, x[2], first, tokens, channel, T, A, SIZE, UNIT, LAYOUT, SOME, some)
    x1 = x0
    if B:
        x1 = tile(begin, x[2], first, tokens, channel + A, T, B, SIZE, UNIT, LAYOUT, SOME, A + B > SIZE)
    return x0, x1


@triton.jit
def store_both(
    x, first, tokens, channel, x0, x1, A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """The same, written."""
    some: tl.constexpr = (B == 0) and (SIZE % A != 0)
    begin = x[0] + x[1] * UNIT
    store_tile(begin, x[2], first, tokens, channel, x0, SIZE, UNIT, LAYOUT, some)
    if B:
        store_tile(begin, x[2], first, tokens, channel + A, x1, SIZE, UNIT, LAYOUT, A + B > SIZE)


@triton.jit
def pair(
    x, first, tokens, channel, T: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr,
    UNIT: tl.constexpr, LAYOUTS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """The tiles of a pair; those of the first twice, where nothing changes."""
    tiles = both(x[0], first, tokens, channel, T, A, B, SIZE, UNIT, LAYOUTS % 4, SOME)
    changes = tiles
    if x[1][0] is not None:
        changes = both(x[1], first, tokens, channel, T, A, B, SIZE, UNIT, LAYOUTS // 4, SOME)
    return tiles, changes


@triton.jit
def add_both(x, y, total, B: tl.constexpr):
    """total + x y'"""
    total = add_products(x[0], tl.trans(y[0]), total)
    if B:
        total = add_products(x[1], tl.trans(y[1]), total)
    return total


@triton.jit
def products(
    x, tiles_of_x, first_x, tokens_of_x, y, tiles_of_y, first_y, tokens_of_y, X: tl.constexpr, Y: tl.constexpr,
    CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr,
    LAYOUTS_OF_X: tl.constexpr, LAYOUTS_OF_Y: tl.constexpr, KIND: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """x y' and its change, dx y' + x dy', of X and Y tokens.

    Their tiles have every channel, or else they are CHUNKED: read here, A channels at a time. ``SOME``: whether some of
    the Y tokens may not exist.
    """
    value = tl.zeros((X, Y), KIND)
    change = tl.zeros((X, Y), KIND)
    if CHUNKED:
        for channel in range(0, SIZE, A):
            some_x = pair(x, first_x, tokens_of_x, channel, X, A, 0, SIZE, UNIT, LAYOUTS_OF_X, True)
            some_y = pair(y, first_y, tokens_of_y, channel, Y, A, 0, SIZE, UNIT, LAYOUTS_OF_Y, SOME)
            value = add_both(some_x[0], some_y[0], value, 0)
            if x[1][0] is not None:
                change = add_both(some_x[1], some_y[0], change, 0)
            if y[1][0] is not None:
                change = add_both(some_x[0], some_y[1], change, 0)
    else:
        value = add_both(tiles_of_x[0], tiles_of_y[0], value, B)
        if x[1][0] is not None:
            change = add_both(tiles_of_x[1], tiles_of_y[0], change, B)
        if y[1][0] is not None:
            change = add_both(tiles_of_x[0], tiles_of_y[1], change, B)
    return value, change


@triton.jit
def add_weighted(weights, x, sum0, sum1, B: tl.constexpr):
    """The sums, of A channels and of B, + weights x"""
    weights = weights.to(x[0].dtype)
    sum0 = add_products(weights, x[0], sum0)
    if B:
        sum1 = add_products(weights, x[1], sum1)
    return sum0, sum1
