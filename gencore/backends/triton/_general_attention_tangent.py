"""The derivative of attention with options along a direction, and what its second derivative goes on from.

As of attention without them; which keys are read is as in the forward pass.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import empty_with_channels, readable, writable
from gencore.backends.triton._attention import Tiles, cut, described, has_warpgroups
from gencore.backends.triton._attention_backward import place, steps
from gencore.backends.triton._attention_products import add_weighted, both, pair, products, store_both
from gencore.backends.triton._attention_seen import SEEN, Plan, kept, keys_of, logits, seen
from gencore.backends.triton._attention_tangent import readable_or_none
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add, words_of_rows


@triton.jit(
    do_not_specialize=[
        *steps("q", "k", "v", "out", "dq", "dk", "dv", "grad_out", "d_out"),
        *("queries", "keys", "heads", "group", "scale"), *SEEN,
    ]
)  # fmt: skip
def general_tangent_kernel(
    q, k, v, out, dq, dk, dv, grad_out, d_out, lse, d_lse, delta, second, mask, lengths, key,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, out_batch: tl.int64, out_head: tl.int64, out_step: tl.int64,
    dq_batch: tl.int64, dq_head: tl.int64, dq_step: tl.int64, dk_batch: tl.int64, dk_head: tl.int64, dk_step: tl.int64,
    dv_batch: tl.int64, dv_head: tl.int64, dv_step: tl.int64,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    d_out_batch: tl.int64, d_out_head: tl.int64, d_out_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, group: tl.int32, scale: tl.float64,
    seed: tl.int64, stream: tl.int64, first_sample: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    mask_query: tl.int64, mask_key: tl.int64, dropped_below: tl.float32, gain: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr,
    PB: tl.constexpr, V_SIZE: tl.constexpr, V_CHUNKED: tl.constexpr, V_A: tl.constexpr, V_B: tl.constexpr,
    V_PA: tl.constexpr, V_PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, Q_LAYOUT: tl.constexpr, K_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr, DQ_LAYOUT: tl.constexpr, DK_LAYOUT: tl.constexpr,
    DV_LAYOUT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, D_OUT_LAYOUT: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_UNIT: tl.constexpr, MASK_HAS_QUERIES: tl.constexpr, MASK_KEYS_TOGETHER: tl.constexpr, MASK_LONG: tl.constexpr,
    DROPS: tl.constexpr, PER_SAMPLE: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """M queries, with a part of their results where a value is divided; of those that are None nothing is made."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    program = tl.program_id(0)
    if CAUSAL:
        # The last queries see the most, and begin first.
        program = tl.num_programs(0) - 1 - program
    first_query, column, number, sample, head = place(program, queries, heads, M, PARTS, V_PA)
    of_queries = (
        (q, sample * q_batch + head * q_head, q_step),
        (dq, sample * dq_batch + head * dq_head, dq_step),
    )
    shared = (head.to(tl.int32) // group).to(tl.int64)
    of_keys = (
        (k, sample * k_batch + shared * k_head, k_step),
        (dk, sample * dk_batch + shared * dk_head, dk_step),
    )
    of_values = (
        (v, sample * v_batch + shared * v_head, v_step),
        (dv, sample * dv_batch + shared * dv_head, dv_step),
    )
    of_grads = (grad_out, sample * grad_out_batch + head * grad_out_head, grad_out_step), (None, None, None)
    of_mask = (mask, sample * mask_batch + head * mask_head, mask_query, mask_key)
    QUERIES: tl.constexpr = Q_LAYOUT + 4 * DQ_LAYOUT
    KEYS: tl.constexpr = K_LAYOUT + 4 * DK_LAYOUT
    VALUES: tl.constexpr = V_LAYOUT + 4 * DV_LAYOUT
    if DROPS:
        words = words_of_rows(key, seed, stream, first_sample, sample, sample >= 0, PER_SAMPLE)
    query = first_query + tl.arange(0, M)
    exists, at = query < queries, number * queries + query
    base = tl.load(lse + at, exists, other=float("-inf"))
    # One that sees no key has no probabilities.
    base = tl.where(base == float("-inf"), float("inf"), base)
    scales = tl.full((1, 1), scale, KIND)

    # Those of a head that is read in chunks nobody uses.
    query_tiles = pair(of_queries, first_query, queries, 0, M, A, B, SIZE, UNIT, QUERIES, True)
    grad_tiles = query_tiles
    if grad_out is not None:
        grad_tiles = pair(of_grads, first_query, queries, 0, M, V_A, V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, True)

    there = keys_of(lengths, sample, keys)
    whole = (tl.minimum(there, first_query + 1) if CAUSAL else there) // N * N
    end = tl.minimum(there, first_query + M) if CAUSAL else there
    # What all logits change by alike changes nothing, and is left out of sums: a large one would take their digits. The
    # first keys tell about how much that is, if what they hold are numbers: they may be hidden.
    few = pair(of_keys, 0, there, 0, N, A, B, SIZE, UNIT, KEYS, True)
    _, changes = products(
        of_queries, query_tiles, first_query, queries, of_keys, few, 0, there, M, N, CHUNKED, A, B, SIZE, UNIT, QUERIES,
        KEYS, KIND, True,
    )  # fmt: skip
    shift = tl.sum(changes * scales, axis=1) / tl.maximum(tl.minimum(there, N), 1).to(KIND)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    mean = tl.zeros((M,), KIND)
    of_grad = tl.zeros((M,), KIND)
    squares = tl.zeros((M,), KIND)
    sum0 = tl.zeros((M, V_PA), KIND)
    sum1 = tl.zeros((M, V_PB if V_PB else 16), KIND)
    for EDGE in tl.static_range(2):
        for first in range(whole if EDGE else 0, end if EDGE else whole, N):
            key_tiles = pair(of_keys, first, there, 0, N, A, B, SIZE, UNIT, KEYS, EDGE == 1)
            s, t = products(
                of_queries, query_tiles, first_query, queries, of_keys, key_tiles, first, there, M, N, CHUNKED, A, B,
                SIZE, UNIT, QUERIES, KEYS, KIND, EDGE == 1,
            )  # fmt: skip
            s = logits(
                s, scale, of_mask, first_query, first, queries, there, M, N, False, EDGE == 1, CAUSAL, MASK_UNIT,
                MASK_HAS_QUERIES, MASK_KEYS_TOGETHER, MASK_LONG,
            )  # fmt: skip
            p = tl.exp2((s - base[:, None]) * 1.4426950408889634)
            moved = p * multiply_add(t, scales, -shift[:, None])
            mean += tl.sum(moved, axis=1)
            if DROPS:
                # From here on both are without what is dropped.
                keeps = kept(words, dropped_below, head, first_query, first, queries, keys, M, N, False, PARTIAL)
                p = tl.where(keeps, p, 0.0)
                moved = tl.where(keeps, moved, 0.0)
            value_tiles = pair(of_values, first, there, column, N, V_PA, V_PB, V_SIZE, UNIT, VALUES, EDGE == 1)
            if second is not None:
                dp, e = products(
                    of_grads, grad_tiles, first_query, queries, of_values, value_tiles, first, there, M, N, V_CHUNKED,
                    V_A, V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, VALUES, KIND, EDGE == 1,
                )  # fmt: skip
                of_grad += tl.sum(p * dp, axis=1)
                squares += tl.sum(multiply_add(moved, dp, p * e), axis=1)
            if d_out is not None:
                sum0, sum1 = add_weighted(moved, value_tiles[0], sum0, sum1, V_PB)
                if dv is not None:
                    sum0, sum1 = add_weighted(p, value_tiles[1], sum0, sum1, V_PB)

    if d_out is not None:
        gains = tl.full((1, 1), gain, KIND)
        out = (out, sample * out_batch + head * out_head, out_step)
        to = (d_out, sample * d_out_batch + head * d_out_head, d_out_step)
        out0, out1 = both(out, first_query, queries, column, M, V_PA, V_PB, V_SIZE, UNIT, OUT_LAYOUT, True)
        sum0 = sum0 * gains - mean[:, None] * out0
        if V_PB:
            sum1 = sum1 * gains - mean[:, None] * out1
        store_both(to, first_query, queries, column, sum0, sum1, V_PA, V_PB, V_SIZE, UNIT, D_OUT_LAYOUT)
    # Every part of a head has found them. The probabilities of a query that sees no key have the sum 0.
    exists = query < tl.where(column == 0, queries, 0)
    tl.store(d_lse + at, tl.where(base == float("inf"), 0.0, mean + shift), exists)
    if second is not None:
        gains_of_queries = tl.full((M,), gain, KIND)
        of_grad *= gains_of_queries
        tl.store(delta + at, of_grad, exists)
        tl.store(second + at, multiply_add(-of_grad, mean, squares * gains_of_queries), exists)


@functools.lru_cache(256)
def plan_of_queries(size: int, size_v: int, dtype: torch.dtype, warpgroups: bool, busy: bool) -> Plan:
    """How heads of those sizes are cut where programs have queries: here, and for their gradients' gradients.

    As without options, but that a mask or noise, which make it ``busy``, take the registers that a second tile in
    flight would, or the longer one of short heads.
    """
    if dtype == torch.float64:
        return Plan(cut(size, 16, 64), cut(size_v, 16, 64), Tiles(32, 16, 4, 1))
    wide = max(size, size_v)
    if dtype == torch.float32:
        return Plan(cut(size, 16, 128), cut(size_v, 16, 128), Tiles(64, 32 if wide <= 64 else 16, 8, 1))
    of_head, of_value = (cut(x, 64 if x > 128 else 0, 128) for x in (size, size_v))
    stages = 1 if busy else 2
    if warpgroups:
        return Plan(of_head, of_value, Tiles(128, 64 if wide <= 64 and not busy else 32, 8, stages))
    return Plan(of_head, of_value, Tiles(128 if wide <= 64 else 64, 32, 8, stages))


def along(
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    direction: tuple[Tensor | None, ...],
    scale: float,
    hiding: tuple[list[Tensor | None], list[int | float], dict[str, Any]],
    d_out: Tensor | None,
    d_lse: Tensor,
    grad_out: Tensor | None = None,
    second: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """As of attention without options, with what :func:`seen` gives; ``tensors``: q, k, v, out."""
    q, k, v, out = tensors
    batch, heads, queries, size = q.shape
    given = {"dq": direction[0], "dk": direction[1], "dv": direction[2], "grad_out": grad_out, "d_out": d_out}
    # What is not there is described as something that is.
    some = {"q": q, "k": k, "v": v, "out": out} | {name: q if x is None else x for name, x in given.items()}
    arguments, constants = described(some, queries=queries, keys=k.shape[2])
    hidden, numbers, kinds = hiding
    busy = hidden[0] is not None or kinds["DROPS"]
    plan = plan_of_queries(size, v.shape[3], q.dtype, has_warpgroups(q), busy)
    parts = plan.of_value.parts
    with device_of(q):
        general_tangent_kernel[(batch * heads * parts * triton.cdiv(queries, plan.tiles.queries),)](
            q, k, v, out, *given.values(), lse, d_lse, *second, *hidden, *arguments, heads, heads // k.shape[1], scale,
            *numbers, PARTS=parts, **plan.constants, **constants, **kinds, enable_fp_fusion=False,
        )  # fmt: skip


def general_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    key: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    d_out, lse = empty_with_channels(q, v.shape[3]), lse.sum(0)
    d_lse = torch.empty_like(lse)
    if q.numel() == 0 or k.numel() == 0:
        return d_out.zero_(), d_lse.zero_()
    q, k, v, out = (readable(tensor) for tensor in (q, k, v, out))
    into, hiding = writable(d_out), seen(q, k, mask, key_lengths, key, causal, dropout)
    along((q, k, v, out), lse, readable_or_none(dq, dk, dv), scale, hiding, into, d_lse)
    return d_out if into is d_out else d_out.copy_(into), d_lse
