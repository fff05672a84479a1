"""The derivative of attention along a direction, and what the second derivative goes on from.

A program has some queries of a head and goes through its keys, tile by tile, as in the gradient: the probabilities are
made again from the logarithm of each query's denominator.
"""

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
from gencore.backends.triton._attention_products import add_weighted, both, pair, products, store_both
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add


@triton.jit(
    do_not_specialize=[
        *steps("q", "k", "v", "out", "dq", "dk", "dv", "grad_out", "d_out"), "heads", "queries", "keys", "scale",
    ]
)  # fmt: skip
def tangent_kernel(
    q, k, v, out, dq, dk, dv, grad_out, d_out, lse, d_lse, delta, second,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64, out_batch: tl.int64, out_head: tl.int64, out_step: tl.int64,
    dq_batch: tl.int64, dq_head: tl.int64, dq_step: tl.int64, dk_batch: tl.int64, dk_head: tl.int64, dk_step: tl.int64,
    dv_batch: tl.int64, dv_head: tl.int64, dv_step: tl.int64,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    d_out_batch: tl.int64, d_out_head: tl.int64, d_out_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, scale: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, Q_LAYOUT: tl.constexpr, K_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr, DQ_LAYOUT: tl.constexpr, DK_LAYOUT: tl.constexpr,
    DV_LAYOUT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, D_OUT_LAYOUT: tl.constexpr,
):  # fmt: skip
    """M queries, with a part of their results where a head is divided; of those that are None nothing is made."""
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
    query = first_query + tl.arange(0, M)
    base = tl.load(lse + number * queries + query, query < queries, other=0.0) * 1.4426950408889634
    factor = tl.full((M,), scale * 1.4426950408889634, KIND)
    scales = tl.full((M,), scale, KIND)

    # Those of a head that is read in chunks nobody uses.
    query_tiles = pair(of_queries, first_query, queries, 0, M, A, B, SIZE, UNIT, QUERIES, True)
    grad_tiles = query_tiles
    if grad_out is not None:
        grad_tiles = pair(of_grads, first_query, queries, 0, M, A, B, SIZE, UNIT, GRAD_OUT_LAYOUT, True)

    # What all logits change by alike changes nothing, and is left out of sums: a large one would take their digits. The
    # first keys tell about how much that is.
    few = pair(of_keys, 0, keys, 0, N, A, B, SIZE, UNIT, KEYS, True)
    _, changes = products(
        of_queries, query_tiles, first_query, queries, of_keys, few, 0, keys, M, N, CHUNKED, A, B, SIZE, UNIT, QUERIES,
        KEYS, KIND, True,
    )  # fmt: skip
    shift = scales * tl.sum(changes, axis=1) / tl.minimum(keys, N).to(KIND)
    mean = tl.zeros((M,), KIND)
    of_grad = tl.zeros((M,), KIND)
    squares = tl.zeros((M,), KIND)
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
            p = tl.exp2(multiply_add(s, factor[:, None], -base[:, None]))
            if REST:
                # What has no key may overflow.
                p = tl.where((first + tl.arange(0, N) < keys)[None, :], p, 0.0)
            moved = p * multiply_add(t, scales[:, None], -shift[:, None])
            mean += tl.sum(moved, axis=1)
            value_tiles = pair(of_values, first, keys, column, N, PA, PB, SIZE, UNIT, VALUES, REST == 1)
            if second is not None:
                dp, e = products(
                    of_grads, grad_tiles, first_query, queries, of_values, value_tiles, first, keys, M, N, CHUNKED, A,
                    B, SIZE, UNIT, GRAD_OUT_LAYOUT, VALUES, KIND, REST == 1,
                )  # fmt: skip
                of_grad += tl.sum(p * dp, axis=1)
                squares += tl.sum(multiply_add(moved, dp, p * e), axis=1)
            if d_out is not None:
                sum0, sum1 = add_weighted(moved, value_tiles[0], sum0, sum1, PB)
                if dv is not None:
                    sum0, sum1 = add_weighted(p, value_tiles[1], sum0, sum1, PB)

    if d_out is not None:
        out = (out, sample * out_batch + head * out_head, out_step)
        to = (d_out, sample * d_out_batch + head * d_out_head, d_out_step)
        out0, out1 = both(out, first_query, queries, column, M, PA, PB, SIZE, UNIT, OUT_LAYOUT, True)
        sum0 -= mean[:, None] * out0
        if PB:
            sum1 -= mean[:, None] * out1
        store_both(to, first_query, queries, column, sum0, sum1, PA, PB, SIZE, UNIT, D_OUT_LAYOUT)
    # Every part of a head has found them.
    exists = query < tl.where(column == 0, queries, 0)
    at = number * queries + query
    tl.store(d_lse + at, mean + shift, exists)
    if second is not None:
        tl.store(delta + at, of_grad, exists)
        tl.store(second + at, multiply_add(-of_grad, mean, squares), exists)


@functools.lru_cache(256)
def plan_of_queries(size: int, dtype: torch.dtype, warpgroups: bool) -> tuple[Cut, Tiles]:
    """How a head of that size is cut where programs have queries: here, and for their gradients' gradients.

    Of a tile of queries by keys there are up to four products at a time, so that tiles are shorter than in the
    gradient. With warpgroups the queries come from shared memory for each tile of keys, and shorter ones would wait for
    them: then it costs less that a thread lacks a few of its registers, 12 to 20 at 64 channels and 26 to 52 at 128,
    and reads them again from the cache. Longer heads are read in chunks, and their products made again for each part.
    """
    if dtype == torch.float64:
        return cut(size, 16, 64), Tiles(32, 16, 4, 1)
    if dtype == torch.float32:
        return cut(size, 16, 128), Tiles(64, 32 if size <= 64 else 16, 8, 1)
    work = cut(size, 64 if size > 128 else 0, 128)
    if warpgroups:
        return work, Tiles(128, 64 if size <= 64 else 32, 8, 2)
    return work, Tiles(128 if size <= 64 else 64, 32, 8, 2)


def along(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    direction: tuple[Tensor | None, ...],
    scale: float,
    d_out: Tensor | None,
    d_lse: Tensor,
    grad_out: Tensor | None = None,
    second: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Writes to ``d_out``, ``d_lse`` and, for the gradient ``grad_out``, to what ``second`` has, where they are there.

    Every tensor is readable and has an element. ``second``: of each query the sums of p dp, and of p w, in the words of
    csrc/include/gencore/attention.h.
    """
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    given = {"dq": direction[0], "dk": direction[1], "dv": direction[2], "grad_out": grad_out, "d_out": d_out}
    # What is not there is described as something that is.
    tensors = {"q": q, "k": k, "v": v, "out": out} | {name: q if x is None else x for name, x in given.items()}
    arguments, constants = described(tensors, queries=queries, keys=keys)
    work, tiles = plan_of_queries(size, q.dtype, has_warpgroups(q))
    with device_of(q):
        tangent_kernel[(batch * heads * work.parts * triton.cdiv(queries, tiles.queries),)](
            q, k, v, out, *given.values(), lse, d_lse, *second, *arguments, heads, scale,
            PARTS=work.parts, **work.constants, M=tiles.queries, N=tiles.keys, **constants,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
        )  # fmt: skip


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
    d_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``d_out``: where to write to, with strides as those of a readable tensor."""
    if d_out is None:
        d_out = torch.empty_like(q)
    lse = lse.contiguous()
    d_lse = torch.empty_like(lse)
    if q.numel() == 0 or k.numel() == 0:
        return d_out.zero_(), d_lse.zero_()
    q, k, v, out = (readable(tensor) for tensor in (q, k, v, out))
    into = writable(d_out)
    along(q, k, v, out, lse, readable_or_none(dq, dk, dv), scale, into, d_lse)
    return d_out if into is d_out else d_out.copy_(into), d_lse


def readable_or_none(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else readable(tensor) for tensor in tensors)
