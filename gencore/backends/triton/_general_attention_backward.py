"""The gradients of attention with masks, causal order, lengths, shared heads, other value sizes and dropout.

As those of attention: a program has some keys and goes through all queries that see them, of every head that shares
them; another has some queries and goes through their keys.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import readable, writable
from gencore.backends.triton._attention import Cut, Tiles, cut, described, has_warpgroups
from gencore.backends.triton._attention_backward import delta_of, place, steps
from gencore.backends.triton._attention_products import add_weighted, both, store_both
from gencore.backends.triton._attention_seen import SEEN, Plan, kept, keys_of, log_sums, logits, parts_of, product, seen
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import words_of_rows


@triton.jit(
    do_not_specialize=[
        *steps("grad_out", "q", "k", "v", "grad_k", "grad_v"), "queries", "keys", "heads", "group", "scale", *SEEN,
    ]
)  # fmt: skip
def general_keys_kernel(
    grad_out, q, k, v, grad_k, grad_v, lse, base, delta, mask, lengths, key,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64,
    grad_k_batch: tl.int64, grad_k_head: tl.int64, grad_k_step: tl.int64,
    grad_v_batch: tl.int64, grad_v_head: tl.int64, grad_v_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, group: tl.int32, scale: tl.float64,
    seed: tl.int64, stream: tl.int64, first_sample: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    mask_query: tl.int64, mask_key: tl.int64, dropped_below: tl.float32, gain: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, V_SIZE: tl.constexpr, V_CHUNKED: tl.constexpr, V_A: tl.constexpr,
    V_B: tl.constexpr, V_PA: tl.constexpr, V_PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, GRAD_K_LAYOUT: tl.constexpr, GRAD_V_LAYOUT: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_UNIT: tl.constexpr, MASK_HAS_QUERIES: tl.constexpr, MASK_KEYS_TOGETHER: tl.constexpr,
    MASK_LONG: tl.constexpr, DROPS: tl.constexpr, PER_SAMPLE: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The gradients of N keys, of N values, or of both, with a part of them where one of the two is divided."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    first_key, column, _, sample, shared = place(
        tl.program_id(0), keys, heads // group, N, PARTS, V_PA if grad_k is None else PA
    )
    of_k = column * 0 if grad_k is None else column
    of_v = column * 0 if grad_v is None else column
    of_keys = (k, sample * k_batch + shared * k_head, k_step)
    of_values = (v, sample * v_batch + shared * v_head, v_step)
    there = keys_of(lengths, sample, keys)
    if DROPS:
        words = words_of_rows(key, seed, stream, first_sample, sample, sample >= 0, PER_SAMPLE)
    # Those of a head that is read in chunks nobody uses.
    key_tiles = both(of_keys, first_key, there, 0, N, A, B, SIZE, UNIT, K_LAYOUT, True)
    value_tiles = both(of_values, first_key, there, 0, N, V_A, V_B, V_SIZE, UNIT, V_LAYOUT, True)
    gains = tl.full((1, 1), gain, KIND)
    grad_k0 = tl.zeros((N, PA), KIND)
    grad_k1 = tl.zeros((N, PB if PB else 16), KIND)
    grad_v0 = tl.zeros((N, V_PA), KIND)
    grad_v1 = tl.zeros((N, V_PB if V_PB else 16), KIND)
    # The first of the queries that see a key, and the last.
    begin = first_key // M * M if CAUSAL else first_key * 0
    end = tl.where(first_key < there, queries, 0)
    for member in range(group):
        head = shared * group + member
        of_queries = (q, sample * q_batch + head * q_head, q_step)
        of_grads = (grad_out, sample * grad_out_batch + head * grad_out_head, grad_out_step)
        of_mask = (mask, sample * mask_batch + head * mask_head, mask_query, mask_key)
        row = (sample * heads + head) * queries
        for first in range(begin, end, M):
            query = first + tl.arange(0, M)
            query_tiles = both(of_queries, first, queries, of_k, M, PA, PB, SIZE, UNIT, Q_LAYOUT, True)
            grad_tiles = both(of_grads, first, queries, of_v, M, V_PA, V_PB, V_SIZE, UNIT, GRAD_OUT_LAYOUT, True)
            s = product(
                of_keys, key_tiles, first_key, there, of_queries, query_tiles, first, queries, N, M, CHUNKED, A, B,
                SIZE, UNIT, K_LAYOUT, Q_LAYOUT, KIND, True,
            )  # fmt: skip
            s = logits(
                s, scale, of_mask, first, first_key, queries, there, M, N, True, True, CAUSAL, MASK_UNIT,
                MASK_HAS_QUERIES, MASK_KEYS_TOGETHER, MASK_LONG,
            )  # fmt: skip
            top, rest = log_sums(lse, base, row + query, query < queries)
            p = tl.exp2(((s - top[None, :]) - rest[None, :]) * 1.4426950408889634)
            if DROPS:
                keeps = kept(words, dropped_below, head, first, first_key, queries, keys, M, N, True, PARTIAL)
            if grad_v is not None:
                weights = tl.where(keeps, p, 0.0) if DROPS else p
                grad_v0, grad_v1 = add_weighted(weights, grad_tiles, grad_v0, grad_v1, V_PB)
            if grad_k is not None:
                dp = product(
                    of_values, value_tiles, first_key, there, of_grads, grad_tiles, first, queries, N, M, V_CHUNKED,
                    V_A, V_B, V_SIZE, UNIT, V_LAYOUT, GRAD_OUT_LAYOUT, KIND, True,
                )  # fmt: skip
                if DROPS:
                    dp = tl.where(keeps, dp * gains, 0.0)
                ds = p * (dp - tl.load(delta + row + query, query < queries, other=0.0)[None, :])
                grad_k0, grad_k1 = add_weighted(ds, query_tiles, grad_k0, grad_k1, PB)

    # What is beyond a sample's length has no gradient.
    exists = (first_key + tl.arange(0, N) < there)[:, None]
    if grad_k is not None:
        scales = tl.full((1, 1), scale, KIND)
        grad_k0 = tl.where(exists, grad_k0 * scales, 0.0)
        grad_k1 = tl.where(exists, grad_k1 * scales, 0.0)
        to = (grad_k, sample * grad_k_batch + shared * grad_k_head, grad_k_step)
        store_both(to, first_key, keys, of_k, grad_k0, grad_k1, PA, PB, SIZE, UNIT, GRAD_K_LAYOUT)
    if grad_v is not None:
        grad_v0 = tl.where(exists, grad_v0 * gains, 0.0)
        grad_v1 = tl.where(exists, grad_v1 * gains, 0.0)
        to = (grad_v, sample * grad_v_batch + shared * grad_v_head, grad_v_step)
        store_both(to, first_key, keys, of_v, grad_v0, grad_v1, V_PA, V_PB, V_SIZE, UNIT, GRAD_V_LAYOUT)


@triton.jit(
    do_not_specialize=[
        *steps("grad_out", "q", "k", "v", "grad_q"), "queries", "keys", "heads", "group", "scale", *SEEN,
    ]
)  # fmt: skip
def general_queries_kernel(
    grad_out, q, k, v, grad_q, lse, base, delta, mask, lengths, key,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64,
    grad_q_batch: tl.int64, grad_q_head: tl.int64, grad_q_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, group: tl.int32, scale: tl.float64,
    seed: tl.int64, stream: tl.int64, first_sample: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    mask_query: tl.int64, mask_key: tl.int64, dropped_below: tl.float32, gain: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, V_SIZE: tl.constexpr, V_CHUNKED: tl.constexpr, V_A: tl.constexpr,
    V_B: tl.constexpr, V_PA: tl.constexpr, V_PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, GRAD_Q_LAYOUT: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_UNIT: tl.constexpr, MASK_HAS_QUERIES: tl.constexpr, MASK_KEYS_TOGETHER: tl.constexpr, MASK_LONG: tl.constexpr,
    DROPS: tl.constexpr, PER_SAMPLE: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """The gradients of M queries."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    program = tl.program_id(0)
    if CAUSAL:
        # The last queries see the most, and begin first.
        program = tl.num_programs(0) - 1 - program
    first_query, column, number, sample, head = place(program, queries, heads, M, PARTS, PA)
    of_queries = (q, sample * q_batch + head * q_head, q_step)
    shared = (head.to(tl.int32) // group).to(tl.int64)
    of_keys = (k, sample * k_batch + shared * k_head, k_step)
    of_values = (v, sample * v_batch + shared * v_head, v_step)
    of_grads = (grad_out, sample * grad_out_batch + head * grad_out_head, grad_out_step)
    of_mask = (mask, sample * mask_batch + head * mask_head, mask_query, mask_key)
    if DROPS:
        words = words_of_rows(key, seed, stream, first_sample, sample, sample >= 0, PER_SAMPLE)
    # Those of a head that is read in chunks nobody uses.
    query_tiles = both(of_queries, first_query, queries, 0, M, A, B, SIZE, UNIT, Q_LAYOUT, True)
    grad_tiles = both(of_grads, first_query, queries, 0, M, V_A, V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, True)
    query = first_query + tl.arange(0, M)
    top, rest = log_sums(lse, base, number * queries + query, query < queries)
    of_grad = tl.load(delta + number * queries + query, query < queries, other=0.0)[:, None]
    gains = tl.full((1, 1), gain, KIND)
    sum0 = tl.zeros((M, PA), KIND)
    sum1 = tl.zeros((M, PB if PB else 16), KIND)
    there = keys_of(lengths, sample, keys)
    whole = (tl.minimum(there, first_query + 1) if CAUSAL else there) // N * N
    end = tl.minimum(there, first_query + M) if CAUSAL else there
    for EDGE in tl.static_range(2):
        for first in range(whole if EDGE else 0, end if EDGE else whole, N):
            key_tiles = both(of_keys, first, there, column, N, PA, PB, SIZE, UNIT, K_LAYOUT, EDGE == 1)
            s = product(
                of_queries, query_tiles, first_query, queries, of_keys, key_tiles, first, there, M, N, CHUNKED, A, B,
                SIZE, UNIT, Q_LAYOUT, K_LAYOUT, KIND, EDGE == 1,
            )  # fmt: skip
            s = logits(
                s, scale, of_mask, first_query, first, queries, there, M, N, False, EDGE == 1, CAUSAL, MASK_UNIT,
                MASK_HAS_QUERIES, MASK_KEYS_TOGETHER, MASK_LONG,
            )  # fmt: skip
            p = tl.exp2(((s - top[:, None]) - rest[:, None]) * 1.4426950408889634)
            value_tiles = both(of_values, first, there, 0, N, V_A, V_B, V_SIZE, UNIT, V_LAYOUT, EDGE == 1)
            dp = product(
                of_grads, grad_tiles, first_query, queries, of_values, value_tiles, first, there, M, N, V_CHUNKED, V_A,
                V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, V_LAYOUT, KIND, EDGE == 1,
            )  # fmt: skip
            if DROPS:
                keeps = kept(words, dropped_below, head, first_query, first, queries, keys, M, N, False, PARTIAL)
                dp = tl.where(keeps, dp * gains, 0.0)
            sum0, sum1 = add_weighted(p * (dp - of_grad), key_tiles, sum0, sum1, PB)

    scales = tl.full((1, 1), scale, KIND)
    to = (grad_q, sample * grad_q_batch + head * grad_q_head, grad_q_step)
    store_both(to, first_query, queries, column, sum0 * scales, sum1 * scales, PA, PB, SIZE, UNIT, GRAD_Q_LAYOUT)


@triton.jit(
    do_not_specialize=[*steps("grad_out", "q", "k", "v"), "queries", "keys", "batch", "heads", "group", "scale", *SEEN]
)  # fmt: skip
def general_mask_kernel(
    grad_out, q, k, v, grad_mask, lse, base, delta, mask, lengths, key,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64,
    queries: tl.int64, keys: tl.int64, batch: tl.int32, heads: tl.int32, group: tl.int32, scale: tl.float64,
    seed: tl.int64, stream: tl.int64, first_sample: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    mask_query: tl.int64, mask_key: tl.int64, dropped_below: tl.float32, gain: tl.float64,
    SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    V_SIZE: tl.constexpr, V_CHUNKED: tl.constexpr, V_A: tl.constexpr, V_B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr,
    GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr, K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_UNIT: tl.constexpr, MASK_HAS_QUERIES: tl.constexpr, MASK_KEYS_TOGETHER: tl.constexpr,
    MASK_LONG: tl.constexpr, DROPS: tl.constexpr, PER_SAMPLE: tl.constexpr, PARTIAL: tl.constexpr,
    HAS_SAMPLES: tl.constexpr, HAS_HEADS: tl.constexpr, HAS_QUERIES: tl.constexpr,
):  # fmt: skip
    """The gradient of the mask for N keys and M queries, or all, summed over samples and heads that share it."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    program = tl.program_id(0)
    tiles = tl.cdiv(keys, N).to(tl.int32)
    first_key = (program % tiles).to(tl.int64) * N
    program = program // tiles
    tiles = tl.cdiv(queries, M).to(tl.int32) if HAS_QUERIES else 1
    first_query = (program % tiles).to(tl.int64) * M
    plane = program // tiles
    of_head = (plane % heads if HAS_HEADS else plane * 0).to(tl.int64)
    of_sample = ((plane // heads if HAS_HEADS else plane) if HAS_SAMPLES else plane * 0).to(tl.int64)
    # The first of the queries that see a key, and the last.
    begin = first_query
    end = tl.minimum(first_query + M, queries) if HAS_QUERIES else queries
    if CAUSAL:
        begin = tl.maximum(first_query, first_key // M * M)
    gains = tl.full((1, 1), gain, KIND)
    total = tl.zeros((M, N), KIND) if HAS_QUERIES else tl.zeros((1, N), KIND)
    for number in range(1 if HAS_SAMPLES else batch):
        sample = of_sample + number
        there = keys_of(lengths, sample, keys)
        if DROPS:
            words = words_of_rows(key, seed, stream, first_sample, sample, sample >= 0, PER_SAMPLE)
        for member in range(1 if HAS_HEADS else heads):
            head = of_head + member
            shared = (head.to(tl.int32) // group).to(tl.int64)
            of_queries = (q, sample * q_batch + head * q_head, q_step)
            of_grads = (grad_out, sample * grad_out_batch + head * grad_out_head, grad_out_step)
            of_keys = (k, sample * k_batch + shared * k_head, k_step)
            of_values = (v, sample * v_batch + shared * v_head, v_step)
            of_mask = (mask, sample * mask_batch + head * mask_head, mask_query, mask_key)
            row = (sample * heads + head) * queries
            # Those of a head that is read in chunks nobody uses.
            key_tiles = both(of_keys, first_key, there, 0, N, A, B, SIZE, UNIT, K_LAYOUT, True)
            value_tiles = both(of_values, first_key, there, 0, N, V_A, V_B, V_SIZE, UNIT, V_LAYOUT, True)
            for first in range(begin, end, M):
                query = first + tl.arange(0, M)
                query_tiles = both(of_queries, first, queries, 0, M, A, B, SIZE, UNIT, Q_LAYOUT, True)
                grad_tiles = both(of_grads, first, queries, 0, M, V_A, V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, True)
                s = product(
                    of_queries, query_tiles, first, queries, of_keys, key_tiles, first_key, there, M, N, CHUNKED, A, B,
                    SIZE, UNIT, Q_LAYOUT, K_LAYOUT, KIND, True,
                )  # fmt: skip
                s = logits(
                    s, scale, of_mask, first, first_key, queries, there, M, N, False, True, CAUSAL, MASK_UNIT,
                    MASK_HAS_QUERIES, MASK_KEYS_TOGETHER, MASK_LONG,
                )  # fmt: skip
                top, rest = log_sums(lse, base, row + query, query < queries)
                p = tl.exp2(((s - top[:, None]) - rest[:, None]) * 1.4426950408889634)
                dp = product(
                    of_grads, grad_tiles, first, queries, of_values, value_tiles, first_key, there, M, N, V_CHUNKED,
                    V_A, V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, V_LAYOUT, KIND, True,
                )  # fmt: skip
                if DROPS:
                    keeps = kept(words, dropped_below, head, first, first_key, queries, keys, M, N, False, PARTIAL)
                    dp = tl.where(keeps, dp * gains, 0.0)
                ds = p * (dp - tl.load(delta + row + query, query < queries, other=0.0)[:, None])
                if HAS_QUERIES:
                    total += ds
                else:
                    total += tl.sum(ds, axis=0)[None, :]

    column = first_key + tl.arange(0, N)[None, :]
    if HAS_QUERIES:
        line = first_query + tl.arange(0, M)[:, None]
        at = (plane.to(tl.int64) * queries + line) * keys + column
        tl.store(grad_mask + at, total, (line < queries) & (column < keys))
    else:
        tl.store(grad_mask + plane.to(tl.int64) * keys + column, total, column < keys)


def _cut(size: int, warpgroups: bool, busy: bool) -> Cut:
    """Of a half type."""
    limit = 192 if busy else 256
    return cut(size, 64 if size > (limit if warpgroups else 128) else 0, 256)


@functools.lru_cache(256)
def plan_of_keys(size: int, size_v: int, dtype: torch.dtype, warpgroups: bool, busy: bool) -> tuple[Plan, bool]:
    """How heads of those sizes are cut for the gradients of keys and values, and whether they are made in one go.

    A mask or noise, which make it ``busy``, take the registers that a second tile in flight would, or long heads.
    """
    if dtype == torch.float64:
        return Plan(cut(size, 16, 64), cut(size_v, 16, 64), Tiles(16, 32, 4, 1)), False
    if dtype == torch.float32:
        return Plan(cut(size, 16, 128), cut(size_v, 16, 128), Tiles(32, 64, 8, 1)), False
    wide, stages = max(size, size_v), 1 if busy else 2
    of_head, of_value = (_cut(x, warpgroups, busy) for x in (size, size_v))
    if wide > 128:
        return Plan(of_head, of_value, Tiles(32, 64, 8, stages)), False
    return Plan(of_head, of_value, Tiles(32, 128, 8, stages)), wide <= 64


@functools.lru_cache(256)
def plan_of_queries(size: int, size_v: int, dtype: torch.dtype, warpgroups: bool, busy: bool) -> Plan:
    """How heads of those sizes are cut for the gradients of queries."""
    if dtype == torch.float64:
        return Plan(cut(size, 16, 64), cut(size_v, 16, 64), Tiles(32, 16, 4, 1))
    if dtype == torch.float32:
        return Plan(cut(size, 16, 128), cut(size_v, 16, 128), Tiles(64, 32, 8, 1))
    wide = max(size, size_v)
    of_head, of_value = (_cut(x, warpgroups, busy) for x in (size, size_v))
    return Plan(of_head, of_value, Tiles(128 if wide <= 128 else 64, 64 if wide <= 64 else 32, 8, 2))


@functools.lru_cache(256)
def plan_of_mask(size: int, size_v: int, dtype: torch.dtype, warpgroups: bool) -> Plan:
    """How heads of those sizes are cut for the gradient of a mask."""
    if dtype == torch.float64:
        return Plan(cut(size, 16, 64), cut(size_v, 16, 64), Tiles(32, 16, 4, 1))
    if dtype == torch.float32:
        return Plan(cut(size, 16, 128), cut(size_v, 16, 128), Tiles(64, 32, 8, 1))
    of_head, of_value = (_cut(x, warpgroups, True) for x in (size, size_v))
    return Plan(of_head, of_value, Tiles(64, 64 if max(size, size_v) <= 128 else 32, 8, 1))


def general_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    key: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
    wanted: list[bool],
    grad_mask: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """``grad_mask``: where to write the gradient of the mask to: dense, of the type of ``lse``, and 0."""
    grads = tuple(torch.empty_like(x) if want else None for x, want in zip((q, k, v), wanted, strict=True))
    if q.numel() == 0 or k.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    grad_q, grad_k, grad_v = into = tuple(None if grad is None else writable(grad) for grad in grads)
    grad_out, q, k, v, out = (readable(tensor) for tensor in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    sizes = q.shape[3], v.shape[3], q.dtype, has_warpgroups(q), mask is not None or key is not None
    (batch, heads, queries, _), (shared, keys) = q.shape, k.shape[1:3]
    tensors, tokens = {"grad_out": grad_out, "q": q, "k": k, "v": v}, {"queries": queries, "keys": keys}
    hiding, numbers, kinds = seen(q, k, mask, key_lengths, key, causal, dropout)
    numbers = [heads, heads // shared, scale, *numbers]

    def launch(kernel: Any, plan: Plan, programs: int, parts: int, results: dict[str, Tensor | None], **of: Tensor):
        arguments, constants = described(tensors | of, **tokens)
        kernel[(batch * programs * parts,)](
            grad_out, q, k, v, *results.values(), *parts_of(lse), delta, *hiding, *arguments, *numbers,
            PARTS=parts, **plan.constants, **constants, **kinds, enable_fp_fusion=False,
        )  # fmt: skip

    with device_of(q):
        delta = None if grad_q is grad_k is grad_mask is None else delta_of(grad_out, out)
        if grad_k is not None or grad_v is not None:
            plan, together = plan_of_keys(*sizes)
            programs = shared * triton.cdiv(keys, plan.tiles.keys)
            for of_k, of_v in [(grad_k, grad_v)] if together else [(grad_k, None), (None, grad_v)]:
                if of_k is not None or of_v is not None:
                    parts = (plan.of_value if of_k is None else plan.of_head).parts
                    launch(
                        general_keys_kernel, plan, programs, parts, {"grad_k": of_k, "grad_v": of_v},
                        grad_k=k if of_k is None else of_k, grad_v=v if of_v is None else of_v,
                    )  # fmt: skip
        if grad_q is not None:
            plan = plan_of_queries(*sizes)
            programs = heads * triton.cdiv(queries, plan.tiles.queries)
            launch(general_queries_kernel, plan, programs, plan.of_head.parts, {"grad_q": grad_q}, grad_q=grad_q)
        # Of one for all keys it is 0: what all logits of a query change by alike changes no result.
        if grad_mask is not None and (grad_mask.shape[3] == keys):
            plan, (samples, of_heads, rows, _) = plan_of_mask(*sizes[:4]), grad_mask.shape
            tiles = (triton.cdiv(queries, plan.tiles.queries) if rows > 1 else 1) * triton.cdiv(keys, plan.tiles.keys)
            arguments, constants = described(tensors, **tokens)
            cuts = {name: value for name, value in plan.constants.items() if not name.endswith(("PA", "PB"))}
            general_mask_kernel[(samples * of_heads * tiles,)](
                grad_out, q, k, v, grad_mask, *parts_of(lse), delta, *hiding, *arguments, batch, *numbers,
                **cuts, **constants, **kinds, HAS_SAMPLES=samples > 1, HAS_HEADS=of_heads > 1, HAS_QUERIES=rows > 1,
                enable_fp_fusion=False,
            )  # fmt: skip
    for grad, got in zip(grads, into, strict=True):
        if grad is not None and got is not None and grad is not got:
            grad.copy_(got)
    return grads


def general_attention_mask_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    key_lengths: Tensor | None,
    key: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and of the mask."""
    grad_mask = torch.zeros(mask.shape, dtype=lse.dtype, device=mask.device)
    grads = general_attention_backward(
        grad_out, q, k, v, out, lse, mask, key_lengths, key, scale, causal, dropout, wanted[:3], grad_mask
    )
    return *grads, grad_mask.to(mask.dtype)
