"""Scaled dot-product attention. What it computes is said in csrc/include/gencore/attention.h.

A program has some queries of a head and goes through its keys, tile by tile: of the softmax it keeps the maximum so far
and sums relative to it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import readable, writable
from gencore.backends.triton._attention import (
    Cut,
    Tiles,
    add_products,
    cut,
    described,
    has_warpgroups,
    plane,
    store_tile,
    tile,
)
from gencore.backends.triton._attention_backward import attention_backward as attention_backward
from gencore.backends.triton._attention_double_backward import attention_double_backward as attention_double_backward
from gencore.backends.triton._attention_tangent import attention_jvp as attention_jvp
from gencore.backends.triton._general_attention import general_attention as general_attention
from gencore.backends.triton._general_attention import general_attention_backward as general_attention_backward
from gencore.backends.triton._general_attention import (
    general_attention_mask_backward as general_attention_mask_backward,
)
from gencore.backends.triton._general_attention_double_backward import (
    general_attention_double_backward as general_attention_double_backward,
)
from gencore.backends.triton._general_attention_tangent import general_attention_jvp as general_attention_jvp
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add

_STRIDES = [f"{name}_{step}" for name in ("q", "k", "v", "out") for step in ("batch", "head", "step")]


@triton.jit(do_not_specialize=[*_STRIDES, "heads", "queries", "keys", "scale"])
def attention_kernel(
    q, k, v, out, lse,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, out_batch: tl.int64, out_head: tl.int64, out_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, scale: tl.float64,
    DESCENDING: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, Q_LAYOUT: tl.constexpr, K_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
):  # fmt: skip
    """M queries, with a part of their results where a head is divided. DESCENDING: whether the scale is negative."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    tiles = tl.cdiv(queries, M).to(tl.int32)
    # The tiles of a head are neighbours, so that its keys and values are in the cache.
    program = tl.program_id(0)
    row = program // tiles
    first_query = (program - row * tiles).to(tl.int64) * M
    number = row // PARTS
    column = ((row - number * PARTS) * PA).to(tl.int64)
    sample = (number // heads).to(tl.int64)
    head = (number % heads).to(tl.int64)
    q = plane(q, sample, head, q_batch, q_head, UNIT)
    k = plane(k, sample, head, k_batch, k_head, UNIT)
    v = plane(v, sample, head, v_batch, v_head, UNIT)
    out = plane(out, sample, head, out_batch, out_head, UNIT)

    if not CHUNKED:
        q0 = tile(q, q_step, first_query, queries, 0, M, A, SIZE, UNIT, Q_LAYOUT, True, A > SIZE)
        if B:
            q1 = tile(q, q_step, first_query, queries, A, M, B, SIZE, UNIT, Q_LAYOUT, True, A + B > SIZE)
    # 2^x is what a GPU computes.
    factor = tl.full((M,), scale * 1.4426950408889634, KIND)
    # The largest product, or the smallest. It starts as a number, so that infinities are not subtracted from each other
    # where the logits are finite; beside any that follows it weighs nothing.
    LEAST: tl.constexpr = -1.7976931348623157e308 if q.dtype.element_ty == tl.float64 else -3.4028234663852886e38
    top = tl.full((M,), -LEAST if DESCENDING else LEAST, KIND)
    total = tl.zeros((M,), KIND)
    sum0 = tl.zeros((M, PA), KIND)
    sum1 = tl.zeros((M, PB if PB else 16), KIND)
    whole = keys // N * N
    # Whole tiles of keys, and what is left.
    for REST in tl.static_range(2):
        for first in range(whole if REST else 0, keys if REST else whole, N):
            products = tl.zeros((M, N), KIND)
            if CHUNKED:
                for channel in range(0, SIZE, A):
                    q0 = tile(q, q_step, first_query, queries, channel, M, A, SIZE, UNIT, Q_LAYOUT, True, SIZE % A != 0)
                    k0 = tile(k, k_step, first, keys, channel, N, A, SIZE, UNIT, K_LAYOUT, REST == 1, SIZE % A != 0)
                    products = add_products(q0, tl.trans(k0), products)
            else:
                k0 = tile(k, k_step, first, keys, 0, N, A, SIZE, UNIT, K_LAYOUT, REST == 1, A > SIZE)
                products = add_products(q0, tl.trans(k0), products)
                if B:
                    k1 = tile(k, k_step, first, keys, A, N, B, SIZE, UNIT, K_LAYOUT, REST == 1, A + B > SIZE)
                    products = add_products(q1, tl.trans(k1), products)
            exists = (first + tl.arange(0, N) < keys)[None, :]
            if DESCENDING:
                of_tile = tl.min(tl.where(exists, products, float("inf")) if REST else products, axis=1)
                new_top = tl.minimum(top, of_tile)
            else:
                of_tile = tl.max(tl.where(exists, products, float("-inf")) if REST else products, axis=1)
                new_top = tl.maximum(top, of_tile)
            decay = tl.exp2((top - new_top) * factor)
            top = new_top
            # The difference first: it is exact where p is large, and p is 1 for the maximum itself.
            p = tl.exp2((products - top[:, None]) * factor[:, None])
            if REST:
                p = tl.where(exists, p, 0.0)
            total = total * decay + tl.sum(p, axis=1)
            weights = p.to(v.dtype.element_ty)
            v0 = tile(v, v_step, first, keys, column, N, PA, SIZE, UNIT, V_LAYOUT, REST == 1, PARTS * PA > SIZE)
            sum0 = add_products(weights, v0, sum0 * decay[:, None])
            if PB:
                v1 = tile(v, v_step, first, keys, PA, N, PB, SIZE, UNIT, V_LAYOUT, REST == 1, PA + PB > SIZE)
                sum1 = add_products(weights, v1, sum1 * decay[:, None])

    sum0 = sum0 / total[:, None]
    store_tile(out, out_step, first_query, queries, column, sum0, SIZE, UNIT, OUT_LAYOUT, PARTS * PA > SIZE)
    if PB:
        sum1 = sum1 / total[:, None]
        store_tile(out, out_step, first_query, queries, PA, sum1, SIZE, UNIT, OUT_LAYOUT, PA + PB > SIZE)
    if lse is not None:
        query = first_query + tl.arange(0, M)
        value = multiply_add(top, tl.full((M,), scale, KIND), tl.log(total))
        # Every part of a head has found it.
        tl.store(lse + number.to(tl.int64) * queries + query, value, query < tl.where(column == 0, queries, 0))


@functools.lru_cache(256)
def plan(size: int, dtype: torch.dtype, warpgroups: bool) -> tuple[Cut, Tiles]:
    """How a head of that size is cut.

    In the half types a warp has 16 queries, so that a thread's sums, half as many as channels, leave it registers for
    the logits. Shared memory has the queries and, for each stage, a tile of keys and one of values: with warpgroups 120
    KiB at most, and 160 for heads of 512, whose queries would else be read again with each tile of keys. Without them
    queries are in registers, so that longer heads are read in chunks, and it stays below the 99 KiB of smaller GPUs.
    Beyond 160 channels two warpgroups share the sums, some of which Triton 3.6 keeps in memory where it has but one.
    The other types are multiplied by each thread, or by the tensor cores of float64, and take short chunks.
    """
    if dtype == torch.float64:
        return cut(size, 16, 64), Tiles(32, 16, 4, 1)
    if dtype == torch.float32:
        return cut(size, 16, 128), Tiles(64, 32, 8, 1)
    if size > (512 if warpgroups else 192):
        return cut(size, 64, 256), Tiles(64, 32, 8, 2)
    if size > 160 and warpgroups:
        return cut(size, 0, 256), Tiles(64, 32, 8, 2)
    if size > 128:
        return cut(size, 0, 256), Tiles(64, 64 if warpgroups else 32, 4, 2)
    return cut(size, 0, 256), Tiles(128, 64, 8, 3 if size <= 64 else 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``out``: where to write to, with strides as those of a readable tensor; ``with_lse``: whether to keep it."""
    if out is None:
        out = torch.empty_like(q)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=dtype) if with_lse else None
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    if q.numel() == 0 or keys == 0:
        out.zero_()
        return out, None if lse is None else lse.fill_(float("-inf"))
    q, k, v, given, out = readable(q), readable(k), readable(v), out, writable(out)
    arguments, constants = described({"q": q, "k": k, "v": v, "out": out}, queries=queries, keys=keys)
    work, tiles = plan(size, q.dtype, has_warpgroups(q))
    grid = (batch * heads * work.parts * triton.cdiv(queries, tiles.queries),)
    with device_of(q):
        attention_kernel[grid](
            q, k, v, out, lse, *arguments, heads, scale,
            DESCENDING=scale < 0, PARTS=work.parts, **work.constants, M=tiles.queries, N=tiles.keys, **constants,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out if out is given else given.copy_(out), lse
