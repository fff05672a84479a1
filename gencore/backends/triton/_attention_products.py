"""What the kernels of attention's second derivative and forward mode have in common: products of two tiles of tokens.

Rows and columns of a product are queries and keys, or keys and queries. Each side is four tensors (x, dx, y, dy): of
queries q, its change, the gradient of the result, and none; of keys k, its change, v, and that of v. Each is a view, a
tuple: the tensor, where the head begins in it, and the step from token to token or channel to channel; the layouts of
the four are one number, two bits for each. A tensor that is None is 0.
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
def all_of(
    side, first, tokens, channel, T: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr,
    UNIT: tl.constexpr, LAYOUTS: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """The tiles of each view of a side; where there is none, those of x, which nobody uses."""
    x = both(side[0], first, tokens, channel, T, A, B, SIZE, UNIT, LAYOUTS % 4, SOME)
    dx, y, dy = x, x, x
    if side[1][0] is not None:
        dx = both(side[1], first, tokens, channel, T, A, B, SIZE, UNIT, LAYOUTS // 4 % 4, SOME)
    if side[2][0] is not None:
        y = both(side[2], first, tokens, channel, T, A, B, SIZE, UNIT, LAYOUTS // 16 % 4, SOME)
    if side[3][0] is not None:
        dy = both(side[3], first, tokens, channel, T, A, B, SIZE, UNIT, LAYOUTS // 64, SOME)
    return x, dx, y, dy


@triton.jit
def add_both(x, y, total, B: tl.constexpr):
    """total + x y'"""
    total = add_products(x[0], tl.trans(y[0]), total)
    if B:
        total = add_products(x[1], tl.trans(y[1]), total)
    return total


@triton.jit
def add_all(of_rows, rows, of_columns, columns, s, t, dp, e, B: tl.constexpr):
    """The products of tiles, added to what is given."""
    s = add_both(rows[0], columns[0], s, B)
    if of_rows[1][0] is not None:
        t = add_both(rows[1], columns[0], t, B)
    if of_columns[1][0] is not None:
        t = add_both(rows[0], columns[1], t, B)
    if of_rows[2][0] is not None and of_columns[2][0] is not None:
        dp = add_both(rows[2], columns[2], dp, B)
    if of_rows[2][0] is not None and of_columns[3][0] is not None:
        e = add_both(rows[2], columns[3], e, B)
    if of_rows[3][0] is not None and of_columns[2][0] is not None:
        e = add_both(rows[3], columns[2], e, B)
    return s, t, dp, e


@triton.jit
def products(
    of_rows, rows, first_row, row_tokens, of_columns, first_column, column_tokens, column, R: tl.constexpr,
    C: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr,
    SIZE: tl.constexpr, UNIT: tl.constexpr, OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, KIND: tl.constexpr,
    SOME: tl.constexpr,
):  # fmt: skip
    """Of R rows and C columns: the tiles of the columns with the channels of this part, and the products, not scaled.

    ``rows``: their tiles, if not CHUNKED. The products are those of q with k, their change along dq and dk, those of
    grad_out with v, and of grad_out with dv.
    """
    s = tl.zeros((R, C), KIND)
    t = tl.zeros((R, C), KIND)
    dp = tl.zeros((R, C), KIND)
    e = tl.zeros((R, C), KIND)
    if CHUNKED:
        for channel in range(0, SIZE, A):
            some_rows = all_of(of_rows, first_row, row_tokens, channel, R, A, 0, SIZE, UNIT, OF_ROWS, True)
            some_columns = all_of(of_columns, first_column, column_tokens, channel, C, A, 0, SIZE, UNIT, OF_COLUMNS, SOME)
            s, t, dp, e = add_all(of_rows, some_rows, of_columns, some_columns, s, t, dp, e, 0)
        columns = all_of(of_columns, first_column, column_tokens, column, C, PA, PB, SIZE, UNIT, OF_COLUMNS, SOME)
    else:
        columns = all_of(of_columns, first_column, column_tokens, 0, C, A, B, SIZE, UNIT, OF_COLUMNS, SOME)
        s, t, dp, e = add_all(of_rows, rows, of_columns, columns, s, t, dp, e, B)
    return columns, s, t, dp, e


@triton.jit
def add_weighted(weights, x, sum0, sum1, B: tl.constexpr):
    """The sums, of A channels and of B, + weights x"""
    weights = weights.to(x[0].dtype)
    sum0 = add_products(weights, x[0], sum0)
    if B:
        sum1 = add_products(weights, x[1], sum1)
    return sum0, sum1
