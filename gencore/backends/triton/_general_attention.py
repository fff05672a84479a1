"""Attention with masks, causal order, lengths, shared heads, other value sizes and dropout.

As the kernel of attention: a program has some queries of a head and goes through its keys, tile by tile. Tiles that
none of them sees are not read.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import empty_parts_of_log_sums, empty_with_channels, readable, writable
from gencore.backends.triton._attention import Tiles, cut, described, has_warpgroups
from gencore.backends.triton._attention_backward import place, steps
from gencore.backends.triton._attention_products import add_weighted, both, store_both
from gencore.backends.triton._attention_seen import SEEN, Plan, kept, keys_of, logits, parts_of, product, seen
from gencore.backends.triton._general_attention_backward import general_attention_backward as general_attention_backward
from gencore.backends.triton._general_attention_backward import (
    general_attention_mask_backward as general_attention_mask_backward,
)
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import words_of_rows


@triton.jit(
    do_not_specialize=[*steps("q", "k", "v", "out"), "queries", "keys", "heads", "group", "scale", *SEEN]
)  # fmt: skip
def general_attention_kernel(
    q, k, v, out, lse, base, mask, lengths, key,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, out_batch: tl.int64, out_head: tl.int64, out_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, group: tl.int32, scale: tl.float64,
    seed: tl.int64, stream: tl.int64, first_sample: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    mask_query: tl.int64, mask_key: tl.int64, dropped_below: tl.float32, gain: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, V_SIZE: tl.constexpr, V_CHUNKED: tl.constexpr, V_A: tl.constexpr,
    V_B: tl.constexpr, V_PA: tl.constexpr, V_PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, Q_LAYOUT: tl.constexpr, K_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr, CAUSAL: tl.constexpr, MASK_UNIT: tl.constexpr,
    MASK_HAS_QUERIES: tl.constexpr, MASK_KEYS_TOGETHER: tl.constexpr, MASK_LONG: tl.constexpr, DROPS: tl.constexpr,
    PER_SAMPLE: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """M queries, with a part of their results where a value is divided. ``group``: heads that share keys."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    program = tl.program_id(0)
    if CAUSAL:
        # The last queries see the most, and begin first.
        program = tl.num_programs(0) - 1 - program
    first_query, column, number, sample, head = place(program, queries, heads, M, PARTS, V_PA)
    of_queries = (q, sample * q_batch + head * q_head, q_step)
    shared = (head.to(tl.int32) // group).to(tl.int64)
    of_keys = (k, sample * k_batch + shared * k_head, k_step)
    of_values = (v, sample * v_batch + shared * v_head, v_step)
    of_mask = (mask, sample * mask_batch + head * mask_head, mask_query, mask_key)
    if DROPS:
        words = words_of_rows(key, seed, stream, first_sample, sample, sample >= 0, PER_SAMPLE)
    # Those of a head that is read in chunks nobody uses.
    query_tiles = both(of_queries, first_query, queries, 0, M, A, B, SIZE, UNIT, Q_LAYOUT, True)
    # The largest logit. It starts as a number, so that infinities are not subtracted from each other where all keys of
    # a tile are hidden; beside any that follows it weighs nothing.
    LEAST: tl.constexpr = -1.7976931348623157e308 if q.dtype.element_ty == tl.float64 else -3.4028234663852886e38
    top = tl.full((M,), LEAST, KIND)
    total = tl.zeros((M,), KIND)
    sum0 = tl.zeros((M, V_PA), KIND)
    sum1 = tl.zeros((M, V_PB if V_PB else 16), KIND)
    there = keys_of(lengths, sample, keys)
    whole = (tl.minimum(there, first_query + 1) if CAUSAL else there) // N * N
    end = tl.minimum(there, first_query + M) if CAUSAL else there
    for EDGE in tl.static_range(2):
        for first in range(whole if EDGE else 0, end if EDGE else whole, N):
            key_tiles = both(of_keys, first, there, 0, N, A, B, SIZE, UNIT, K_LAYOUT, EDGE == 1)
            s = product(
                of_queries, query_tiles, first_query, queries, of_keys, key_tiles, first, there, M, N, CHUNKED, A, B,
                SIZE, UNIT, Q_LAYOUT, K_LAYOUT, KIND, EDGE == 1,
            )  # fmt: skip
            s = logits(
                s, scale, of_mask, first_query, first, queries, there, M, N, False, EDGE == 1, CAUSAL, MASK_UNIT,
                MASK_HAS_QUERIES, MASK_KEYS_TOGETHER, MASK_LONG,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(s, axis=1))
            decay = tl.exp2((top - new_top) * 1.4426950408889634)
            top = new_top
            # 2^x is what a GPU computes.
            p = tl.exp2((s - top[:, None]) * 1.4426950408889634)
            total = total * decay + tl.sum(p, axis=1)
            if DROPS:
                p = tl.where(
                    kept(words, dropped_below, head, first_query, first, queries, keys, M, N, False, PARTIAL), p, 0.0
                )
            value_tiles = both(of_values, first, there, column, N, V_PA, V_PB, V_SIZE, UNIT, V_LAYOUT, EDGE == 1)
            sum0, sum1 = add_weighted(p, value_tiles, sum0 * decay[:, None], sum1 * decay[:, None], V_PB)

    # A query that sees no key gets 0.
    over = (tl.full((M,), gain, KIND) / tl.where(total == 0, 1.0, total))[:, None]
    to = (out, sample * out_batch + head * out_head, out_step)
    store_both(to, first_query, queries, column, sum0 * over, sum1 * over, V_PA, V_PB, V_SIZE, UNIT, OUT_LAYOUT)
    if lse is not None:
        query = first_query + tl.arange(0, M)
        # Every part of a head has found it.
        exists = query < tl.where(column == 0, queries, 0)
        tl.store(base + number * queries + query, tl.where(total == 0, 0.0, top), exists)
        tl.store(lse + number * queries + query, tl.log(total), exists)


@functools.lru_cache(256)
def plan(size: int, size_v: int, dtype: torch.dtype, warpgroups: bool) -> Plan:
    """How heads of those sizes are cut; a value's parts are the programs."""
    if dtype == torch.float64:
        return Plan(cut(size, 16, 64), cut(size_v, 0, 64), Tiles(32, 16, 4, 1))
    if dtype == torch.float32:
        return Plan(cut(size, 16, 128), cut(size_v, 0, 128), Tiles(64, 32, 8, 1))
    wide, limit = max(size, size_v), 256 if warpgroups else 128
    of_head, of_value = cut(size, 64 if size > limit else 0, 256), cut(size_v, 0, 256)
    return Plan(of_head, of_value, Tiles(128, 64, 8, 2) if wide <= 128 else Tiles(64, 32, 8, 2))


def general_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    key: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    out = empty_with_channels(q, v.shape[3])
    lse = empty_parts_of_log_sums(q) if with_lse else None
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    if q.numel() == 0 or keys == 0:
        return out.zero_(), None if lse is None else lse.fill_(float("-inf"))
    q, k, v, into = readable(q), readable(k), readable(v), writable(out)
    arguments, constants = described({"q": q, "k": k, "v": v, "out": into}, queries=queries, keys=keys)
    hiding, numbers, kinds = seen(q, k, mask, key_lengths, key, causal, dropout)
    work = plan(size, v.shape[3], q.dtype, has_warpgroups(q))
    parts = work.of_value.parts
    with device_of(q):
        general_attention_kernel[(batch * heads * parts * triton.cdiv(queries, work.tiles.queries),)](
            q, k, v, into, *parts_of(lse), *hiding, *arguments, heads, heads // k.shape[1], scale, *numbers,
            PARTS=parts, **work.constants, **constants, **kinds, enable_fp_fusion=False,
        )  # fmt: skip
    return out if into is out else out.copy_(into), lse
