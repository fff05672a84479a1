"""The gradient of attention's gradient, with options: as without them; which keys are read is as in the gradient."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import readable, writable
from gencore.backends.triton._attention import Tiles, cut, described, has_warpgroups
from gencore.backends.triton._attention_backward import place, steps
from gencore.backends.triton._attention_products import add_weighted, pair, products, store_both
from gencore.backends.triton._attention_seen import SEEN, Plan, kept, keys_of, logits, seen
from gencore.backends.triton._attention_tangent import readable_or_none
from gencore.backends.triton._general_attention_tangent import along, plan_of_queries
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add, words_of_rows

_STEPS = steps("grad_out", "q", "k", "v", "dq", "dk", "dv")
_NUMBERS = ["queries", "keys", "heads", "group", "scale", *SEEN]


@triton.jit(do_not_specialize=[*_STEPS, *steps("grad_k", "grad_v"), *_NUMBERS])
def general_second_keys_kernel(
    grad_out, q, k, v, dq, dk, dv, grad_k, grad_v, lse, mean, delta, second, mask, lengths, key,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, dq_batch: tl.int64, dq_head: tl.int64, dq_step: tl.int64,
    dk_batch: tl.int64, dk_head: tl.int64, dk_step: tl.int64, dv_batch: tl.int64, dv_head: tl.int64, dv_step: tl.int64,
    grad_k_batch: tl.int64, grad_k_head: tl.int64, grad_k_step: tl.int64,
    grad_v_batch: tl.int64, grad_v_head: tl.int64, grad_v_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, group: tl.int32, scale: tl.float64,
    seed: tl.int64, stream: tl.int64, first_sample: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    mask_query: tl.int64, mask_key: tl.int64, dropped_below: tl.float32, gain: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr,
    PB: tl.constexpr, V_SIZE: tl.constexpr, V_CHUNKED: tl.constexpr, V_A: tl.constexpr, V_B: tl.constexpr,
    V_PA: tl.constexpr, V_PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, DQ_LAYOUT: tl.constexpr, DK_LAYOUT: tl.constexpr,
    DV_LAYOUT: tl.constexpr, GRAD_K_LAYOUT: tl.constexpr, GRAD_V_LAYOUT: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_UNIT: tl.constexpr, MASK_HAS_QUERIES: tl.constexpr, MASK_KEYS_TOGETHER: tl.constexpr, MASK_LONG: tl.constexpr,
    DROPS: tl.constexpr, PER_SAMPLE: tl.constexpr, PARTIAL: tl.constexpr,
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
    of_keys = (
        (k, sample * k_batch + shared * k_head, k_step),
        (dk, sample * dk_batch + shared * dk_head, dk_step),
    )
    of_values = (
        (v, sample * v_batch + shared * v_head, v_step),
        (dv, sample * dv_batch + shared * dv_head, dv_step),
    )
    QUERIES: tl.constexpr = Q_LAYOUT + 4 * DQ_LAYOUT
    KEYS: tl.constexpr = K_LAYOUT + 4 * DK_LAYOUT
    VALUES: tl.constexpr = V_LAYOUT + 4 * DV_LAYOUT
    there = keys_of(lengths, sample, keys)
    if DROPS:
        words = words_of_rows(key, seed, stream, first_sample, sample, sample >= 0, PER_SAMPLE)
    # Those of a head that is read in chunks nobody uses.
    key_tiles = pair(of_keys, first_key, there, 0, N, A, B, SIZE, UNIT, KEYS, True)
    value_tiles = pair(of_values, first_key, there, 0, N, V_A, V_B, V_SIZE, UNIT, VALUES, True)
    gains = tl.full((1, 1), gain, KIND)
    scales = tl.full((1, 1), scale, KIND)
    grad_k0 = tl.zeros((N, PA), KIND)
    grad_k1 = tl.zeros((N, PB if PB else 16), KIND)
    grad_v0 = tl.zeros((N, V_PA), KIND)
    grad_v1 = tl.zeros((N, V_PB if V_PB else 16), KIND)
    # The first of the queries that see a key, and the last.
    begin = first_key // M * M if CAUSAL else first_key * 0
    end = tl.where(first_key < there, queries, 0)
    for member in range(group):
        head = shared * group + member
        of_queries = (
            (q, sample * q_batch + head * q_head, q_step),
            (dq, sample * dq_batch + head * dq_head, dq_step),
        )
        of_grads = (grad_out, sample * grad_out_batch + head * grad_out_head, grad_out_step), (None, None, None)
        of_mask = (mask, sample * mask_batch + head * mask_head, mask_query, mask_key)
        row = (sample * heads + head) * queries
        for first in range(begin, end, M):
            query = first + tl.arange(0, M)
            exists, at = query < queries, row + query
            query_tiles = pair(of_queries, first, queries, of_k, M, PA, PB, SIZE, UNIT, QUERIES, True)
            grad_tiles = pair(of_grads, first, queries, of_v, M, V_PA, V_PB, V_SIZE, UNIT, GRAD_OUT_LAYOUT, True)
            s, t = products(
                of_keys, key_tiles, first_key, there, of_queries, query_tiles, first, queries, N, M, CHUNKED, A, B,
                SIZE, UNIT, KEYS, QUERIES, KIND, True,
            )  # fmt: skip
            s = logits(
                s, scale, of_mask, first, first_key, queries, there, M, N, True, True, CAUSAL, MASK_UNIT,
                MASK_HAS_QUERIES, MASK_KEYS_TOGETHER, MASK_LONG,
            )  # fmt: skip
            base = tl.load(lse + at, exists, other=float("-inf"))
            # One that sees no key has no probabilities.
            base = tl.where(base == float("-inf"), float("inf"), base)
            p = tl.exp2((s - base[None, :]) * 1.4426950408889634)
            moved = multiply_add(t, scales, -tl.load(mean + at, exists, other=0.0)[None, :])
            if DROPS:
                keeps = kept(words, dropped_below, head, first, first_key, queries, keys, M, N, True, PARTIAL)
            if grad_v is not None:
                weights = tl.where(keeps, p * moved, 0.0) if DROPS else p * moved
                grad_v0, grad_v1 = add_weighted(weights, grad_tiles[0], grad_v0, grad_v1, V_PB)
            if grad_k is not None:
                dp, e = products(
                    of_values, value_tiles, first_key, there, of_grads, grad_tiles, first, queries, N, M, V_CHUNKED,
                    V_A, V_B, V_SIZE, UNIT, VALUES, GRAD_OUT_LAYOUT, KIND, True,
                )  # fmt: skip
                if DROPS:
                    dp = tl.where(keeps, dp * gains, 0.0)
                    e = tl.where(keeps, e * gains, 0.0)
                dp -= tl.load(delta + at, exists, other=0.0)[None, :]
                z = p * (multiply_add(moved, dp, -tl.load(second + at, exists, other=0.0)[None, :]) + e)
                grad_k0, grad_k1 = add_weighted(z, query_tiles[0], grad_k0, grad_k1, PB)
                if dq is not None:
                    grad_k0, grad_k1 = add_weighted(p * dp, query_tiles[1], grad_k0, grad_k1, PB)

    # What is beyond a sample's length has no gradient.
    known = (first_key + tl.arange(0, N) < there)[:, None]
    if grad_k is not None:
        grad_k0 = tl.where(known, grad_k0 * scales, 0.0)
        grad_k1 = tl.where(known, grad_k1 * scales, 0.0)
        to = (grad_k, sample * grad_k_batch + shared * grad_k_head, grad_k_step)
        store_both(to, first_key, keys, of_k, grad_k0, grad_k1, PA, PB, SIZE, UNIT, GRAD_K_LAYOUT)
    if grad_v is not None:
        grad_v0 = tl.where(known, grad_v0 * gains, 0.0)
        grad_v1 = tl.where(known, grad_v1 * gains, 0.0)
        to = (grad_v, sample * grad_v_batch + shared * grad_v_head, grad_v_step)
        store_both(to, first_key, keys, of_v, grad_v0, grad_v1, V_PA, V_PB, V_SIZE, UNIT, GRAD_V_LAYOUT)


@triton.jit(do_not_specialize=[*_STEPS, *steps("grad_q"), *_NUMBERS])
def general_second_queries_kernel(
    grad_out, q, k, v, dq, dk, dv, grad_q, lse, mean, delta, second, mask, lengths, key,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, dq_batch: tl.int64, dq_head: tl.int64, dq_step: tl.int64,
    dk_batch: tl.int64, dk_head: tl.int64, dk_step: tl.int64, dv_batch: tl.int64, dv_head: tl.int64, dv_step: tl.int64,
    grad_q_batch: tl.int64, grad_q_head: tl.int64, grad_q_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, group: tl.int32, scale: tl.float64,
    seed: tl.int64, stream: tl.int64, first_sample: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    mask_query: tl.int64, mask_key: tl.int64, dropped_below: tl.float32, gain: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr,
    PB: tl.constexpr, V_SIZE: tl.constexpr, V_CHUNKED: tl.constexpr, V_A: tl.constexpr, V_B: tl.constexpr,
    V_PA: tl.constexpr, V_PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, DQ_LAYOUT: tl.constexpr, DK_LAYOUT: tl.constexpr,
    DV_LAYOUT: tl.constexpr, GRAD_Q_LAYOUT: tl.constexpr, CAUSAL: tl.constexpr, MASK_UNIT: tl.constexpr,
    MASK_HAS_QUERIES: tl.constexpr, MASK_KEYS_TOGETHER: tl.constexpr, MASK_LONG: tl.constexpr, DROPS: tl.constexpr,
    PER_SAMPLE: tl.constexpr, PARTIAL: tl.constexpr,
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
    # Those of a head that is read in chunks nobody uses.
    query_tiles = pair(of_queries, first_query, queries, 0, M, A, B, SIZE, UNIT, QUERIES, True)
    grad_tiles = pair(of_grads, first_query, queries, 0, M, V_A, V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, True)
    query = first_query + tl.arange(0, M)
    exists, at = query < queries, number * queries + query
    base = tl.load(lse + at, exists, other=float("-inf"))
    # One that sees no key has no probabilities.
    base = tl.where(base == float("-inf"), float("inf"), base)
    of_lse = tl.load(mean + at, exists, other=0.0)
    of_grad = tl.load(delta + at, exists, other=0.0)
    of_second = tl.load(second + at, exists, other=0.0)
    gains = tl.full((1, 1), gain, KIND)
    scales = tl.full((1, 1), scale, KIND)
    sum0 = tl.zeros((M, PA), KIND)
    sum1 = tl.zeros((M, PB if PB else 16), KIND)
    there = keys_of(lengths, sample, keys)
    whole = (tl.minimum(there, first_query + 1) if CAUSAL else there) // N * N
    end = tl.minimum(there, first_query + M) if CAUSAL else there
    for EDGE in tl.static_range(2):
        for first in range(whole if EDGE else 0, end if EDGE else whole, N):
            key_tiles = pair(of_keys, first, there, column, N, PA, PB, SIZE, UNIT, KEYS, EDGE == 1)
            s, t = products(
                of_queries, query_tiles, first_query, queries, of_keys, key_tiles, first, there, M, N, CHUNKED, A, B,
                SIZE, UNIT, QUERIES, KEYS, KIND, EDGE == 1,
            )  # fmt: skip
            s = logits(
                s, scale, of_mask, first_query, first, queries, there, M, N, False, EDGE == 1, CAUSAL, MASK_UNIT,
                MASK_HAS_QUERIES, MASK_KEYS_TOGETHER, MASK_LONG,
            )  # fmt: skip
            p = tl.exp2((s - base[:, None]) * 1.4426950408889634)
            moved = multiply_add(t, scales, -of_lse[:, None])
            value_tiles = pair(of_values, first, there, 0, N, V_A, V_B, V_SIZE, UNIT, VALUES, EDGE == 1)
            dp, e = products(
                of_grads, grad_tiles, first_query, queries, of_values, value_tiles, first, there, M, N, V_CHUNKED, V_A,
                V_B, V_SIZE, UNIT, GRAD_OUT_LAYOUT, VALUES, KIND, EDGE == 1,
            )  # fmt: skip
            if DROPS:
                keeps = kept(words, dropped_below, head, first_query, first, queries, keys, M, N, False, PARTIAL)
                dp = tl.where(keeps, dp * gains, 0.0)
                e = tl.where(keeps, e * gains, 0.0)
            dp -= of_grad[:, None]
            z = p * (multiply_add(moved, dp, -of_second[:, None]) + e)
            sum0, sum1 = add_weighted(z, key_tiles[0], sum0, sum1, PB)
            if dk is not None:
                sum0, sum1 = add_weighted(p * dp, key_tiles[1], sum0, sum1, PB)

    to = (grad_q, sample * grad_q_batch + head * grad_q_head, grad_q_step)
    store_both(to, first_query, queries, column, sum0 * scales, sum1 * scales, PA, PB, SIZE, UNIT, GRAD_Q_LAYOUT)


@functools.lru_cache(256)
def plan_of_keys(size: int, size_v: int, dtype: torch.dtype, warpgroups: bool, busy: bool) -> tuple[Plan, bool]:
    """How heads of those sizes are cut for the gradients of keys and values, and whether they are made in one go."""
    if dtype == torch.float64:
        return Plan(cut(size, 16, 64), cut(size_v, 16, 64), Tiles(16, 32, 4, 1)), False
    if dtype == torch.float32:
        return Plan(cut(size, 16, 128), cut(size_v, 16, 128), Tiles(32, 64, 8, 1)), False
    wide, stages = max(size, size_v), 1 if busy else 2
    of_head, of_value = (cut(x, 64 if x > 128 else 0, 128) for x in (size, size_v))
    if warpgroups or wide <= 64:
        return Plan(of_head, of_value, Tiles(32, 128, 8, stages)), wide <= 64
    return Plan(of_head, of_value, Tiles(32 if wide <= 128 else 16, 64, 8, stages)), False


def general_attention_double_backward(
    grad_out: Tensor,
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
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    grads = tuple(torch.empty_like(x) if want else None for x, want in zip((grad_out, q, k, v), wanted, strict=True))
    if q.numel() == 0 or k.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    of_grad, grad_q, grad_k, grad_v = into = tuple(None if grad is None else writable(grad) for grad in grads)
    grad_out, q, k, v, out = (readable(tensor) for tensor in (grad_out, q, k, v, out))
    lse, direction = lse.sum(0), readable_or_none(dq, dk, dv)
    mean, delta, second = torch.empty_like(lse), None, None
    if grad_q is not None or grad_k is not None:
        delta, second = torch.empty_like(lse), torch.empty_like(lse)
    hiding = seen(q, k, mask, key_lengths, key, causal, dropout)
    of = None if second is None else grad_out
    along((q, k, v, out), lse, direction, scale, hiding, of_grad, mean, of, (delta, second))

    (batch, heads, queries, _), (shared, keys) = q.shape, k.shape[1:3]
    # What is not there is described as something that is.
    names = ("grad_out", "q", "k", "v", "dq", "dk", "dv")
    given = (grad_out, q, k, v, *direction)
    tensors = {name: q if x is None else x for name, x in zip(names, given, strict=True)}
    hidden, numbers, kinds = hiding
    sizes = q.shape[3], v.shape[3], q.dtype, has_warpgroups(q), mask is not None or key is not None

    def launch(kernel: Any, plan: Plan, programs: int, parts: int, results: list[Tensor | None], **of: Tensor) -> None:
        arguments, constants = described(tensors | of, queries=queries, keys=keys)
        kernel[(batch * programs * parts,)](
            *given, *results, lse, mean, delta, second, *hidden, *arguments, heads, heads // shared, scale, *numbers,
            PARTS=parts, **plan.constants, **constants, **kinds, enable_fp_fusion=False,
        )  # fmt: skip

    with device_of(q):
        if grad_k is not None or grad_v is not None:
            plan, together = plan_of_keys(*sizes)
            programs = shared * triton.cdiv(keys, plan.tiles.keys)
            for of_k, of_v in [(grad_k, grad_v)] if together else [(grad_k, None), (None, grad_v)]:
                if of_k is not None or of_v is not None:
                    parts = (plan.of_value if of_k is None else plan.of_head).parts
                    described_as = {"grad_k": k if of_k is None else of_k, "grad_v": v if of_v is None else of_v}
                    launch(general_second_keys_kernel, plan, programs, parts, [of_k, of_v], **described_as)
        if grad_q is not None:
            plan = plan_of_queries(*sizes)
            programs = heads * triton.cdiv(queries, plan.tiles.queries)
            launch(general_second_queries_kernel, plan, programs, plan.of_head.parts, [grad_q], grad_q=grad_q)
    for grad, got in zip(grads, into, strict=True):
        if grad is not None and got is not None and grad is not got:
            grad.copy_(got)
    return grads
