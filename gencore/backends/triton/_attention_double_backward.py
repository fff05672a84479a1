"""The gradient of attention's gradient: a pass over queries for what each has of its own, then as the gradient's."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencore.backends.layout import readable, writable
from gencore.backends.triton._attention import Cut, Tiles, cut, described, has_warpgroups
from gencore.backends.triton._attention_backward import place, steps
from gencore.backends.triton._attention_products import add_weighted, pair, products, store_both
from gencore.backends.triton._attention_tangent import along, plan_of_queries, readable_or_none
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add

_STEPS = steps("grad_out", "q", "k", "v", "dq", "dk", "dv")


@triton.jit(do_not_specialize=[*_STEPS, *steps("grad_k", "grad_v"), "heads", "queries", "keys", "scale"])
def second_keys_kernel(
    grad_out, q, k, v, dq, dk, dv, grad_k, grad_v, lse, mean, delta, second,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, dq_batch: tl.int64, dq_head: tl.int64, dq_step: tl.int64,
    dk_batch: tl.int64, dk_head: tl.int64, dk_step: tl.int64, dv_batch: tl.int64, dv_head: tl.int64, dv_step: tl.int64,
    grad_k_batch: tl.int64, grad_k_head: tl.int64, grad_k_step: tl.int64,
    grad_v_batch: tl.int64, grad_v_head: tl.int64, grad_v_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, scale: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, DQ_LAYOUT: tl.constexpr, DK_LAYOUT: tl.constexpr,
    DV_LAYOUT: tl.constexpr, GRAD_K_LAYOUT: tl.constexpr, GRAD_V_LAYOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of N keys, of N values, or of both."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    first_key, column, number, sample, head = place(tl.program_id(0), keys, heads, N, PARTS, PA)
    of_queries = (
        (q, sample * q_batch + head * q_head, q_step),
        (dq, sample * dq_batch + head * dq_head, dq_step),
    )
    of_keys = (
        (k, sample * k_batch + head * k_head, k_step),
        (dk, sample * dk_batch + head * dk_head, dk_step),
    )
    of_values = (
        (v, sample * v_batch + head * v_head, v_step),
        (dv, sample * dv_batch + head * dv_head, dv_step),
    )
    of_grads = (grad_out, sample * grad_out_batch + head * grad_out_head, grad_out_step), (None, None, None)
    QUERIES: tl.constexpr = Q_LAYOUT + 4 * DQ_LAYOUT
    KEYS: tl.constexpr = K_LAYOUT + 4 * DK_LAYOUT
    VALUES: tl.constexpr = V_LAYOUT + 4 * DV_LAYOUT
    # Those of a head that is read in chunks nobody uses.
    key_tiles = pair(of_keys, first_key, keys, 0, N, A, B, SIZE, UNIT, KEYS, True)
    value_tiles = pair(of_values, first_key, keys, 0, N, A, B, SIZE, UNIT, VALUES, True)
    factor = tl.full((1, M), scale * 1.4426950408889634, KIND)
    scales = tl.full((1, M), scale, KIND)
    of_k0 = tl.zeros((N, PA), KIND)
    of_k1 = tl.zeros((N, PB if PB else 16), KIND)
    of_v0 = tl.zeros((N, PA), KIND)
    of_v1 = tl.zeros((N, PB if PB else 16), KIND)
    whole = queries // M * M
    # Whole tiles of queries, and what is left.
    for REST in tl.static_range(2):
        for first in range(whole if REST else 0, queries if REST else whole, M):
            query = first + tl.arange(0, M)
            exists, at = query < queries, number * queries + query
            query_tiles = pair(of_queries, first, queries, column, M, PA, PB, SIZE, UNIT, QUERIES, REST == 1)
            s, t = products(
                of_keys, key_tiles, first_key, keys, of_queries, query_tiles, first, queries, N, M, CHUNKED, A, B, SIZE,
                UNIT, KEYS, QUERIES, KIND, REST == 1,
            )  # fmt: skip
            base = tl.load(lse + at, exists, other=0.0) * 1.4426950408889634
            p = tl.exp2(multiply_add(s, factor, -base[None, :]))
            if REST:
                # Queries that do not exist have no probabilities, whatever a key makes of them.
                p = tl.where(exists[None, :], p, 0.0)
            moved = multiply_add(t, scales, -tl.load(mean + at, exists, other=0.0)[None, :])
            grad_tiles = pair(of_grads, first, queries, column, M, PA, PB, SIZE, UNIT, GRAD_OUT_LAYOUT, REST == 1)
            if grad_v is not None:
                of_v0, of_v1 = add_weighted(p * moved, grad_tiles[0], of_v0, of_v1, PB)
            if grad_k is not None:
                dp, e = products(
                    of_values, value_tiles, first_key, keys, of_grads, grad_tiles, first, queries, N, M, CHUNKED, A, B,
                    SIZE, UNIT, VALUES, GRAD_OUT_LAYOUT, KIND, REST == 1,
                )  # fmt: skip
                dp -= tl.load(delta + at, exists, other=0.0)[None, :]
                z = p * (multiply_add(moved, dp, -tl.load(second + at, exists, other=0.0)[None, :]) + e)
                of_k0, of_k1 = add_weighted(z, query_tiles[0], of_k0, of_k1, PB)
                if dq is not None:
                    of_k0, of_k1 = add_weighted(p * dp, query_tiles[1], of_k0, of_k1, PB)

    if grad_k is not None:
        to = (grad_k, sample * grad_k_batch + head * grad_k_head, grad_k_step)
        of_k0 *= tl.full((N, 1), scale, KIND)
        if PB:
            of_k1 *= tl.full((N, 1), scale, KIND)
        store_both(to, first_key, keys, column, of_k0, of_k1, PA, PB, SIZE, UNIT, GRAD_K_LAYOUT)
    if grad_v is not None:
        to = (grad_v, sample * grad_v_batch + head * grad_v_head, grad_v_step)
        store_both(to, first_key, keys, column, of_v0, of_v1, PA, PB, SIZE, UNIT, GRAD_V_LAYOUT)


@triton.jit(do_not_specialize=[*_STEPS, *steps("grad_q"), "heads", "queries", "keys", "scale"])
def second_queries_kernel(
    grad_out, q, k, v, dq, dk, dv, grad_q, lse, mean, delta, second,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, dq_batch: tl.int64, dq_head: tl.int64, dq_step: tl.int64,
    dk_batch: tl.int64, dk_head: tl.int64, dk_step: tl.int64, dv_batch: tl.int64, dv_head: tl.int64, dv_step: tl.int64,
    grad_q_batch: tl.int64, grad_q_head: tl.int64, grad_q_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, scale: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, DQ_LAYOUT: tl.constexpr, DK_LAYOUT: tl.constexpr,
    DV_LAYOUT: tl.constexpr, GRAD_Q_LAYOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of M queries."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    first_query, column, number, sample, head = place(tl.program_id(0), queries, heads, M, PARTS, PA)
    of_queries = (
        (q, sample * q_batch + head * q_head, q_step),
        (dq, sample * dq_batch + head * dq_head, dq_step),
    )
    of_keys = (
        (k, sample * k_batch + head * k_head, k_step),
        (dk, sample * dk_batch + head * dk_head, dk_step),
    )
    of_values = (
        (v, sample * v_batch + head * v_head, v_step),
        (dv, sample * dv_batch + head * dv_head, dv_step),
    )
    of_grads = (grad_out, sample * grad_out_batch + head * grad_out_head, grad_out_step), (None, None, None)
    QUERIES: tl.constexpr = Q_LAYOUT + 4 * DQ_LAYOUT
    KEYS: tl.constexpr = K_LAYOUT + 4 * DK_LAYOUT
    VALUES: tl.constexpr = V_LAYOUT + 4 * DV_LAYOUT
    # Those of a head that is read in chunks nobody uses.
    query_tiles = pair(of_queries, first_query, queries, 0, M, A, B, SIZE, UNIT, QUERIES, True)
    grad_tiles = pair(of_grads, first_query, queries, 0, M, A, B, SIZE, UNIT, GRAD_OUT_LAYOUT, True)
    query = first_query + tl.arange(0, M)
    exists, at = query < queries, number * queries + query
    base = tl.load(lse + at, exists, other=0.0) * 1.4426950408889634
    of_lse = tl.load(mean + at, exists, other=0.0)
    of_grad = tl.load(delta + at, exists, other=0.0)
    of_second = tl.load(second + at, exists, other=0.0)
    factor = tl.full((M, 1), scale * 1.4426950408889634, KIND)
    scales = tl.full((M, 1), scale, KIND)
    sum0 = tl.zeros((M, PA), KIND)
    sum1 = tl.zeros((M, PB if PB else 16), KIND)
    whole = keys // N * N
    # Whole tiles of keys, and what is left.
    for REST in tl.static_range(2):
        for first in range(whole if REST else 0, keys if REST else whole, N):
            key_tiles = pair(of_keys, first, keys, column, N, PA, PB, SIZE, UNIT, KEYS, REST == 1)
            s, t = products(
                of_queries, query_tiles, first_query, queries, of_keys, key_tiles, first, keys, M, N, CHUNKED, A, B,
                SIZE, UNIT, QUERIES, KEYS, KIND, REST == 1,
            )  # fmt: skip
            p = tl.exp2(multiply_add(s, factor, -base[:, None]))
            if REST:
                # What has no key may overflow.
                p = tl.where((first + tl.arange(0, N) < keys)[None, :], p, 0.0)
            moved = multiply_add(t, scales, -of_lse[:, None])
            value_tiles = pair(of_values, first, keys, column, N, PA, PB, SIZE, UNIT, VALUES, REST == 1)
            dp, e = products(
                of_grads, grad_tiles, first_query, queries, of_values, value_tiles, first, keys, M, N, CHUNKED, A, B,
                SIZE, UNIT, GRAD_OUT_LAYOUT, VALUES, KIND, REST == 1,
            )  # fmt: skip
            dp -= of_grad[:, None]
            z = p * (multiply_add(moved, dp, -of_second[:, None]) + e)
            sum0, sum1 = add_weighted(z, key_tiles[0], sum0, sum1, PB)
            if dk is not None:
                sum0, sum1 = add_weighted(p * dp, key_tiles[1], sum0, sum1, PB)

    to = (grad_q, sample * grad_q_batch + head * grad_q_head, grad_q_step)
    sum0 *= scales
    if PB:
        sum1 *= scales
    store_both(to, first_query, queries, column, sum0, sum1, PA, PB, SIZE, UNIT, GRAD_Q_LAYOUT)


@functools.lru_cache(256)
def plan_of_keys(size: int, dtype: torch.dtype, warpgroups: bool) -> tuple[Cut, Tiles, bool]:
    """How a head of that size is cut for the gradients of keys and values, and whether they are made in one go.

    As in the first pass, with keys in the place of queries; in one go where registers have the sums of both.
    """
    if dtype == torch.float64:
        return cut(size, 16, 64), Tiles(16, 32, 4, 1), False
    if dtype == torch.float32:
        return cut(size, 16, 128), Tiles(32, 64, 8, 1), False
    work = cut(size, 64 if size > 128 else 0, 128)
    return work, Tiles(32, 128 if warpgroups or size <= 64 else 64, 8, 2), size <= 64


def attention_double_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    wanted: list[bool],
    grads: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """``grads``: where to write to, with strides as those of readable tensors; all of them are then wanted."""
    into: tuple[Tensor | None, ...] = grads or tuple(
        torch.empty_like(tensor) if want else None for tensor, want in zip((grad_out, q, k, v), wanted, strict=True)
    )
    if q.numel() == 0 or k.numel() == 0:
        for grad in into:
            if grad is not None:
                grad.zero_()
        return into
    written = tuple(None if grad is None else writable(grad) for grad in into)
    grad_out, q, k, v, out = (readable(tensor) for tensor in (grad_out, q, k, v, out))
    _launch(grad_out, q, k, v, out, lse.contiguous(), readable_or_none(dq, dk, dv), scale, written)
    for grad, got in zip(into, written, strict=True):
        if grad is not None and got is not None and grad is not got:
            grad.copy_(got)
    return into


def _launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    direction: tuple[Tensor | None, ...],
    scale: float,
    into: tuple[Tensor | None, ...],
) -> None:
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    of_grad, grad_q, grad_k, grad_v = into
    mean, delta, second = torch.empty_like(lse), None, None
    if grad_q is not None or grad_k is not None:
        delta, second = torch.empty_like(lse), torch.empty_like(lse)
    along(q, k, v, out, lse, direction, scale, of_grad, mean, None if second is None else grad_out, (delta, second))
    dq, dk, dv = direction
    # What is not there is described as something that is.
    of_direction = {name: q if x is None else x for name, x in (("dq", dq), ("dk", dk), ("dv", dv))}
    tensors, tokens = {"grad_out": grad_out, "q": q, "k": k, "v": v} | of_direction, {"queries": queries, "keys": keys}
    given, values = (grad_out, q, k, v, dq, dk, dv), (lse, mean, delta, second)
    with device_of(q):
        if grad_k is not None or grad_v is not None:
            work, tiles, together = plan_of_keys(size, q.dtype, has_warpgroups(q))
            grid = (batch * heads * work.parts * triton.cdiv(keys, tiles.keys),)
            for of_k, of_v in [(grad_k, grad_v)] if together else [(grad_k, None), (None, grad_v)]:
                if of_k is None and of_v is None:
                    continue
                of = {"grad_k": k if of_k is None else of_k, "grad_v": v if of_v is None else of_v}
                arguments, constants = described(tensors | of, **tokens)
                second_keys_kernel[grid](
                    *given, of_k, of_v, *values, *arguments, heads, scale,
                    PARTS=work.parts, **work.constants, M=tiles.queries, N=tiles.keys, **constants,
                    num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
                )  # fmt: skip
        if grad_q is not None:
            work, tiles = plan_of_queries(size, q.dtype, has_warpgroups(q))
            arguments, constants = described(tensors | {"grad_q": grad_q}, **tokens)
            second_queries_kernel[(batch * heads * work.parts * triton.cdiv(queries, tiles.queries),)](
                *given, grad_q, *values, *arguments, heads, scale,
                PARTS=work.parts, **work.constants, M=tiles.queries, N=tiles.keys, **constants,
                num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
            )  # fmt: skip
