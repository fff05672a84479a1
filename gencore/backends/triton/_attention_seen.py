"""Which keys the queries of a tile see, and which probabilities are dropped, tile by tile.

A kernel that goes through keys reads first those tiles of which every query sees every key, but for what the mask says,
and then those at an edge: of the keys, of a sample's length, of what a causal order lets a query see. Tiles that no
query sees are not read. A kernel that goes through queries takes each tile for one at an edge: two such loops, inside
that over heads that share keys, would take too many registers.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.triton._attention import Cut, Tiles
from gencore.backends.triton._attention_products import products
from gencore.backends.triton._tiles import key_arguments, values_of_tile
from gencore.backends.triton.noise import multiply_add


class Plan(NamedTuple):
    """How the channels of a head and those of a value are cut, and the tiles of a kernel."""

    of_head: Cut
    of_value: Cut
    tiles: Tiles

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for; that of values has names that begin with V_."""
        queries, keys, warps, stages = self.tiles
        of_value = {f"V_{name}": number for name, number in self.of_value.constants.items()}
        return self.of_head.constants | of_value | {"M": queries, "N": keys, "num_warps": warps, "num_stages": stages}


# No tile has more queries or keys.
LONGEST = 1024
# The numbers that kernels take for it, in the order in which `seen` gives them.
SEEN = (
    "seed", "stream", "first_sample", "mask_batch", "mask_head", "mask_query", "mask_key", "dropped_below", "gain",
)  # fmt: skip


def seen(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    key: Tensor | None,
    causal: bool,
    dropout: float,
) -> tuple[list[Tensor | None], list[int | float], dict[str, Any]]:
    """What kernels are given of it: tensors (mask, lengths, key), the numbers SEEN, and constants."""
    steps, unit = [0, 0, 0, 0], 1
    if mask is not None:
        steps = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        unit = math.gcd(16 // mask.element_size(), *steps[:3])
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
    words: tuple[Tensor | None, int, int, int, bool] = (None, 0, 0, 0, False)
    if key is not None:
        words = key_arguments(key, q)
    # Uniforms are multiples of 2^-24, so that the comparison is that with the probability itself.
    dropped_below = math.ceil(dropout * 2.0**24) * 2.0**-24
    gain = 1 / (1 - dropout) if dropout < 1 else 0.0
    constants = {
        "CAUSAL": causal,
        "MASK_UNIT": unit,
        "MASK_HAS_QUERIES": steps[2] != 0,
        "MASK_KEYS_TOGETHER": steps[3] == 1,
        "MASK_LONG": max(map(abs, steps[2:])) * LONGEST >= 1 << 31,
        "DROPS": key is not None,
        "PER_SAMPLE": words[4],
        "PARTIAL": k.shape[2] % 4 != 0,
    }
    lengths = None if key_lengths is None else key_lengths.contiguous()
    numbers = [*words[1:4], *(step // unit for step in steps[:3]), steps[3], dropped_below, gain]
    return [mask, lengths, words[0]], numbers, constants


@triton.jit
def keys_of(lengths, sample, keys):
    """How many keys a sample has."""
    if lengths is not None:
        keys = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys)
    return keys


def parts_of(lse: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What kernels keep of denominators: what is left of the logarithm, and the largest logit, apart from it."""
    return (None, None) if lse is None else (lse[0], lse[1])


@triton.jit
def log_sums(lse, base, at, exists):
    """Both, of queries that exist; what is left is infinite of one that sees no key and has no probabilities."""
    rest = tl.load(lse + at, exists, other=float("-inf"))
    return tl.load(base + at, exists, other=0.0), tl.where(rest == float("-inf"), float("inf"), rest)


@triton.jit
def product(
    x, tiles_of_x, first_x, tokens_of_x, y, tiles_of_y, first_y, tokens_of_y, X: tl.constexpr, Y: tl.constexpr,
    CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr, UNIT: tl.constexpr,
    LAYOUT_OF_X: tl.constexpr, LAYOUT_OF_Y: tl.constexpr, KIND: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """x y' of views that do not change."""
    value, _ = products(
        (x, (None, None, None)), (tiles_of_x, tiles_of_x), first_x, tokens_of_x, (y, (None, None, None)),
        (tiles_of_y, tiles_of_y), first_y, tokens_of_y, X, Y, CHUNKED, A, B, SIZE, UNIT, LAYOUT_OF_X, LAYOUT_OF_Y, KIND,
        SOME,
    )  # fmt: skip
    return value


@triton.jit
def left(first, tokens, T: tl.constexpr):
    """How many tokens there are from the first on, up to T."""
    return tl.minimum(tokens - first, T).to(tl.int32)


@triton.jit
def logits(
    s, scale, mask, first_query, first_key, queries, keys, M: tl.constexpr, N: tl.constexpr, KEYS_FIRST: tl.constexpr,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASK_UNIT: tl.constexpr, MASK_HAS_QUERIES: tl.constexpr,
    MASK_KEYS_TOGETHER: tl.constexpr, MASK_LONG: tl.constexpr,
):  # fmt: skip
    """Products of M queries x N keys, or of N keys x M queries, scaled, with the mask: -inf where it hides a key.

    ``mask``: the tensor, where the head begins in it, the steps from query to query and from key to key.
    """
    scales = tl.full((1, 1), scale, s.dtype)
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    if mask[0] is None:
        s *= scales
    else:
        # What changes from tile to tile is one number; the rest is worked out once.
        of_query = mask[2] * MASK_UNIT
        first = mask[1] * MASK_UNIT + first_query * of_query + first_key * mask[3]
        at = n if MASK_KEYS_TOGETHER else n * (mask[3] if MASK_LONG else mask[3].to(tl.int32))
        exists = n < left(first_key, keys, N)
        if MASK_HAS_QUERIES:
            at += m * (of_query if MASK_LONG else of_query.to(tl.int32))
            exists &= m < left(first_query, queries, M)
        value = tl.load(mask[0] + first + at, exists, other=0)
        if KEYS_FIRST:
            value = tl.trans(value)
        if mask[0].dtype.element_ty == tl.uint8:
            s = tl.where(value != 0, s * scales, float("-inf"))
        else:
            bias = value.to(s.dtype)
            # As least_bias of attention.h has it.
            s = tl.where(bias <= -67108864.0, float("-inf"), multiply_add(s, scales, bias))
    if EDGE:
        if KEYS_FIRST:
            m = tl.arange(0, M)[None, :]
            n = tl.arange(0, N)[:, None]
        sees = (m < left(first_query, queries, M)) & (n < left(first_key, keys, N))
        if CAUSAL:
            sees &= n <= m + left(first_key, first_query, N)
        s = tl.where(sees, s, float("-inf"))
    return s


@triton.jit
def kept(
    words, dropped_below, head, first_query, first_key, queries, keys, M: tl.constexpr, N: tl.constexpr,
    KEYS_FIRST: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Which probabilities of M queries x N keys are kept, or of N keys x M queries.

    PARTIAL: whether the rows of queries, of ``keys`` numbers, begin within blocks of noise.
    """
    query = first_query + tl.arange(0, M)
    element = (head * queries + query) * keys + first_key
    four = tl.arange(0, N // 4)
    if KEYS_FIRST:
        block = (element >> 2).to(tl.uint32)[None, :] + four.to(tl.uint32)[:, None]
        values = values_of_tile(block, (element & 3).to(tl.int32)[None, :], words, True, PARTIAL, N // 4, M, 4, True)
    else:
        block = (element >> 2).to(tl.uint32)[:, None] + four.to(tl.uint32)[None, :]
        values = values_of_tile(block, (element & 3).to(tl.int32)[:, None], words, False, PARTIAL, M, N // 4, 4, True)
    return values >= dropped_below
