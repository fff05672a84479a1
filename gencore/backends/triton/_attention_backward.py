"""The gradients of attention: the probabilities are made again from the logarithm of each query's denominator.

One pass over queries for what each has of its own, one over keys for their gradients and those of values, one over
queries again for theirs: no two programs write to one place.
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
from gencore.backends.triton._tiles import device_of
from gencore.backends.triton.noise import multiply_add

_STEPS = ("batch", "head", "step")
# The widest head of a half type whose tiles, and results, fit beside each other.
_WIDEST = 256
# What a program of the first pass takes: queries, and bytes of their channels at a time.
_QUERIES, _BYTES = 64, 128


def steps(*names: str) -> list[str]:
    return [f"{name}_{step}" for name in names for step in _STEPS]


@triton.jit
def place(program, tokens, heads, T: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Of a program: the first of its tokens, the first channel of its part, the number of the head, sample, head.

    The tiles of a head are neighbours, so that what they go through is in the cache.
    """
    tiles = tl.cdiv(tokens, T).to(tl.int32)
    row = program // tiles
    first = (program - row * tiles).to(tl.int64) * T
    number = row // PARTS
    column = ((row - number * PARTS) * PART).to(tl.int64)
    return first, column, number.to(tl.int64), (number // heads).to(tl.int64), (number % heads).to(tl.int64)


@triton.jit(do_not_specialize=[*steps("grad_out", "out"), "heads", "queries"])
def delta_kernel(
    grad_out, out, delta, grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    out_batch: tl.int64, out_head: tl.int64, out_step: tl.int64, queries: tl.int64, heads: tl.int32,
    SIZE: tl.constexpr, M: tl.constexpr, W: tl.constexpr, LOG: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
):  # fmt: skip
    """The product of each query's result and its gradient, summed up over channels; W is 2^LOG."""
    queries = queries.to(tl.int64) * QUERIES_UNIT
    first, _, number, sample, head = place(tl.program_id(0), queries, heads, M, 1, 0)
    grad_out = plane(grad_out, sample, head, grad_out_batch, grad_out_head, UNIT)
    out = plane(out, sample, head, out_batch, out_head, UNIT)
    KIND: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    products = tl.zeros((M, W), KIND)
    for channel in range(0, SIZE, W):
        g = tile(
            grad_out, grad_out_step, first, queries, channel, M, W, SIZE, UNIT, GRAD_OUT_LAYOUT, True, SIZE % W != 0
        )
        o = tile(out, out_step, first, queries, channel, M, W, SIZE, UNIT, OUT_LAYOUT, True, SIZE % W != 0)
        products = multiply_add(g.to(KIND), o.to(KIND), products)
    # In pairs of neighbours: which threads have them changes with strides and addresses, and no bit shall with it.
    for number_of_halving in tl.static_range(LOG):
        even, odd = tl.split(tl.reshape(products, (M, W >> (number_of_halving + 1), 2)))
        products = even + odd
    query = first + tl.arange(0, M)
    tl.store(delta + number * queries + query, tl.reshape(products, (M,)), query < queries)


@triton.jit(
    do_not_specialize=[*steps("grad_out", "q", "k", "v", "grad_k", "grad_v"), "heads", "queries", "keys", "scale"]
)
def keys_kernel(
    grad_out, q, k, v, grad_k, grad_v, lse, delta,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64,
    grad_k_batch: tl.int64, grad_k_head: tl.int64, grad_k_step: tl.int64,
    grad_v_batch: tl.int64, grad_v_head: tl.int64, grad_v_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, scale: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, GRAD_K_LAYOUT: tl.constexpr, GRAD_V_LAYOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of N keys, of N values, or of both."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    first_key, column, number, sample, head = place(tl.program_id(0), keys, heads, N, PARTS, PA)
    grad_out = plane(grad_out, sample, head, grad_out_batch, grad_out_head, UNIT)
    q = plane(q, sample, head, q_batch, q_head, UNIT)
    k = plane(k, sample, head, k_batch, k_head, UNIT)
    v = plane(v, sample, head, v_batch, v_head, UNIT)
    lse += number * queries
    delta += number * queries

    if not CHUNKED:
        k0 = tile(k, k_step, first_key, keys, 0, N, A, SIZE, UNIT, K_LAYOUT, True, A > SIZE)
        if B:
            k1 = tile(k, k_step, first_key, keys, A, N, B, SIZE, UNIT, K_LAYOUT, True, A + B > SIZE)
        if grad_k is not None:
            v0 = tile(v, v_step, first_key, keys, 0, N, A, SIZE, UNIT, V_LAYOUT, True, A > SIZE)
            if B:
                v1 = tile(v, v_step, first_key, keys, A, N, B, SIZE, UNIT, V_LAYOUT, True, A + B > SIZE)
    factor = tl.full((M,), scale * 1.4426950408889634, KIND)
    of_k0 = tl.zeros((N, PA), KIND)
    of_k1 = tl.zeros((N, PB if PB else 16), KIND)
    of_v0 = tl.zeros((N, PA), KIND)
    of_v1 = tl.zeros((N, PB if PB else 16), KIND)
    whole = queries // M * M
    # Whole tiles of queries, and what is left.
    for REST in tl.static_range(2):
        for first in range(whole if REST else 0, queries if REST else whole, M):
            s = tl.zeros((N, M), KIND)
            dp = tl.zeros((N, M), KIND)
            if CHUNKED:
                for channel in range(0, SIZE, A):
                    k0 = tile(k, k_step, first_key, keys, channel, N, A, SIZE, UNIT, K_LAYOUT, True, SIZE % A != 0)
                    q0 = tile(q, q_step, first, queries, channel, M, A, SIZE, UNIT, Q_LAYOUT, REST == 1, SIZE % A != 0)
                    s = add_products(k0, tl.trans(q0), s)
                if grad_k is not None:
                    for channel in range(0, SIZE, A):
                        v0 = tile(v, v_step, first_key, keys, channel, N, A, SIZE, UNIT, V_LAYOUT, True, SIZE % A != 0)
                        g0 = tile(
                            grad_out, grad_out_step, first, queries, channel, M, A, SIZE, UNIT, GRAD_OUT_LAYOUT,
                            REST == 1, SIZE % A != 0,
                        )  # fmt: skip
                        dp = add_products(v0, tl.trans(g0), dp)
                q0 = tile(q, q_step, first, queries, column, M, PA, SIZE, UNIT, Q_LAYOUT, REST == 1, PARTS * PA > SIZE)
                g0 = tile(
                    grad_out, grad_out_step, first, queries, column, M, PA, SIZE, UNIT, GRAD_OUT_LAYOUT, REST == 1,
                    PARTS * PA > SIZE,
                )  # fmt: skip
            else:
                q0 = tile(q, q_step, first, queries, 0, M, A, SIZE, UNIT, Q_LAYOUT, REST == 1, A > SIZE)
                g0 = tile(
                    grad_out, grad_out_step, first, queries, 0, M, A, SIZE, UNIT, GRAD_OUT_LAYOUT, REST == 1, A > SIZE
                )
                s = add_products(k0, tl.trans(q0), s)
                if grad_k is not None:
                    dp = add_products(v0, tl.trans(g0), dp)
            if PB:
                q1 = tile(q, q_step, first, queries, PA, M, PB, SIZE, UNIT, Q_LAYOUT, REST == 1, PA + PB > SIZE)
                g1 = tile(
                    grad_out, grad_out_step, first, queries, PA, M, PB, SIZE, UNIT, GRAD_OUT_LAYOUT, REST == 1,
                    PA + PB > SIZE,
                )  # fmt: skip
                if not CHUNKED:
                    s = add_products(k1, tl.trans(q1), s)
                    if grad_k is not None:
                        dp = add_products(v1, tl.trans(g1), dp)
            query = first + tl.arange(0, M)
            exists = query < queries
            base = tl.load(lse + query, exists, other=0.0) * 1.4426950408889634
            p = tl.exp2(multiply_add(s, factor[None, :], -base[None, :]))
            if REST:
                # Queries that do not exist have no probabilities, whatever a key makes of them.
                p = tl.where(exists[None, :], p, 0.0)
            if grad_v is not None:
                weights = p.to(v.dtype.element_ty)
                of_v0 = add_products(weights, g0, of_v0)
                if PB:
                    of_v1 = add_products(weights, g1, of_v1)
            if grad_k is not None:
                ds = p * (dp - tl.load(delta + query, exists, other=0.0)[None, :])
                weights = ds.to(q.dtype.element_ty)
                of_k0 = add_products(weights, q0, of_k0)
                if PB:
                    of_k1 = add_products(weights, q1, of_k1)

    if grad_k is not None:
        scales = tl.full((N, 1), scale, KIND)
        to = plane(grad_k, sample, head, grad_k_batch, grad_k_head, UNIT)
        of_k0 *= scales
        store_tile(to, grad_k_step, first_key, keys, column, of_k0, SIZE, UNIT, GRAD_K_LAYOUT, PARTS * PA > SIZE)
        if PB:
            of_k1 *= scales
            store_tile(to, grad_k_step, first_key, keys, PA, of_k1, SIZE, UNIT, GRAD_K_LAYOUT, PA + PB > SIZE)
    if grad_v is not None:
        to = plane(grad_v, sample, head, grad_v_batch, grad_v_head, UNIT)
        store_tile(to, grad_v_step, first_key, keys, column, of_v0, SIZE, UNIT, GRAD_V_LAYOUT, PARTS * PA > SIZE)
        if PB:
            store_tile(to, grad_v_step, first_key, keys, PA, of_v1, SIZE, UNIT, GRAD_V_LAYOUT, PA + PB > SIZE)


@triton.jit(do_not_specialize=[*steps("grad_out", "q", "k", "v", "grad_q"), "heads", "queries", "keys", "scale"])
def queries_kernel(
    grad_out, q, k, v, grad_q, lse, delta,
    grad_out_batch: tl.int64, grad_out_head: tl.int64, grad_out_step: tl.int64,
    q_batch: tl.int64, q_head: tl.int64, q_step: tl.int64, k_batch: tl.int64, k_head: tl.int64, k_step: tl.int64,
    v_batch: tl.int64, v_head: tl.int64, v_step: tl.int64,
    grad_q_batch: tl.int64, grad_q_head: tl.int64, grad_q_step: tl.int64,
    queries: tl.int64, keys: tl.int64, heads: tl.int32, scale: tl.float64,
    PARTS: tl.constexpr, SIZE: tl.constexpr, CHUNKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PA: tl.constexpr, PB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    QUERIES_UNIT: tl.constexpr, KEYS_UNIT: tl.constexpr, GRAD_OUT_LAYOUT: tl.constexpr, Q_LAYOUT: tl.constexpr,
    K_LAYOUT: tl.constexpr, V_LAYOUT: tl.constexpr, GRAD_Q_LAYOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of M queries."""
    KIND: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    queries = queries.to(tl.int64) * QUERIES_UNIT
    keys = keys.to(tl.int64) * KEYS_UNIT
    first_query, column, number, sample, head = place(tl.program_id(0), queries, heads, M, PARTS, PA)
    grad_out = plane(grad_out, sample, head, grad_out_batch, grad_out_head, UNIT)
    q = plane(q, sample, head, q_batch, q_head, UNIT)
    k = plane(k, sample, head, k_batch, k_head, UNIT)
    v = plane(v, sample, head, v_batch, v_head, UNIT)
    grad_q = plane(grad_q, sample, head, grad_q_batch, grad_q_head, UNIT)

    if not CHUNKED:
        q0 = tile(q, q_step, first_query, queries, 0, M, A, SIZE, UNIT, Q_LAYOUT, True, A > SIZE)
        g0 = tile(grad_out, grad_out_step, first_query, queries, 0, M, A, SIZE, UNIT, GRAD_OUT_LAYOUT, True, A > SIZE)
        if B:
            of_1: tl.constexpr = A + B > SIZE
            q1 = tile(q, q_step, first_query, queries, A, M, B, SIZE, UNIT, Q_LAYOUT, True, of_1)
            g1 = tile(grad_out, grad_out_step, first_query, queries, A, M, B, SIZE, UNIT, GRAD_OUT_LAYOUT, True, of_1)
    query = first_query + tl.arange(0, M)
    base = tl.load(lse + number * queries + query, query < queries, other=0.0) * 1.4426950408889634
    delta_of = tl.load(delta + number * queries + query, query < queries, other=0.0)
    factor = tl.full((M,), scale * 1.4426950408889634, KIND)
    sum0 = tl.zeros((M, PA), KIND)
    sum1 = tl.zeros((M, PB if PB else 16), KIND)
    whole = keys // N * N
    # Whole tiles of keys, and what is left.
    for REST in tl.static_range(2):
        for first in range(whole if REST else 0, keys if REST else whole, N):
            s = tl.zeros((M, N), KIND)
            dp = tl.zeros((M, N), KIND)
            if CHUNKED:
                for channel in range(0, SIZE, A):
                    some: tl.constexpr = SIZE % A != 0
                    q0 = tile(q, q_step, first_query, queries, channel, M, A, SIZE, UNIT, Q_LAYOUT, True, some)
                    k0 = tile(k, k_step, first, keys, channel, N, A, SIZE, UNIT, K_LAYOUT, REST == 1, some)
                    s = add_products(q0, tl.trans(k0), s)
                    g0 = tile(
                        grad_out, grad_out_step, first_query, queries, channel, M, A, SIZE, UNIT, GRAD_OUT_LAYOUT, True,
                        some,
                    )  # fmt: skip
                    v0 = tile(v, v_step, first, keys, channel, N, A, SIZE, UNIT, V_LAYOUT, REST == 1, some)
                    dp = add_products(g0, tl.trans(v0), dp)
                k0 = tile(k, k_step, first, keys, column, N, PA, SIZE, UNIT, K_LAYOUT, REST == 1, PARTS * PA > SIZE)
            else:
                k0 = tile(k, k_step, first, keys, 0, N, A, SIZE, UNIT, K_LAYOUT, REST == 1, A > SIZE)
                s = add_products(q0, tl.trans(k0), s)
                v0 = tile(v, v_step, first, keys, 0, N, A, SIZE, UNIT, V_LAYOUT, REST == 1, A > SIZE)
                dp = add_products(g0, tl.trans(v0), dp)
            if PB:
                k1 = tile(k, k_step, first, keys, PA, N, PB, SIZE, UNIT, K_LAYOUT, REST == 1, PA + PB > SIZE)
                if not CHUNKED:
                    s = add_products(q1, tl.trans(k1), s)
                    v1 = tile(v, v_step, first, keys, PA, N, PB, SIZE, UNIT, V_LAYOUT, REST == 1, PA + PB > SIZE)
                    dp = add_products(g1, tl.trans(v1), dp)
            p = tl.exp2(multiply_add(s, factor[:, None], -base[:, None]))
            if REST:
                # What has no key may overflow.
                p = tl.where((first + tl.arange(0, N) < keys)[None, :], p, 0.0)
            weights = (p * (dp - delta_of[:, None])).to(k.dtype.element_ty)
            sum0 = add_products(weights, k0, sum0)
            if PB:
                sum1 = add_products(weights, k1, sum1)

    scales = tl.full((M, 1), scale, KIND)
    sum0 *= scales
    store_tile(grad_q, grad_q_step, first_query, queries, column, sum0, SIZE, UNIT, GRAD_Q_LAYOUT, PARTS * PA > SIZE)
    if PB:
        sum1 *= scales
        store_tile(grad_q, grad_q_step, first_query, queries, PA, sum1, SIZE, UNIT, GRAD_Q_LAYOUT, PA + PB > SIZE)


@functools.lru_cache(256)
def plan_of_keys(size: int, dtype: torch.dtype, warpgroups: bool) -> tuple[Cut, Tiles, bool]:
    """How a head of that size is cut for the gradients of keys and values, and whether they are made in one go.

    In one go the logits are made once for both, but a thread has the sums of both in registers. Otherwise as it is for
    the forward pass, with keys in the place of queries; of queries there are two tiles in flight.
    """
    if dtype == torch.float64:
        return cut(size, 16, 64), Tiles(16, 32, 4, 1), False
    if dtype == torch.float32:
        return cut(size, 16, 128), Tiles(32, 64, 8, 1), size <= 64
    if size > (_WIDEST if warpgroups else 192):
        return cut(size, 64, _WIDEST), Tiles(32, 64, 8, 2), False
    if size > 128:
        return cut(size, 0, _WIDEST), Tiles(32, 64, 4, 2), False
    return cut(size, 0, _WIDEST), Tiles(64 if size <= 64 else 32, 128, 8, 2), True


@functools.lru_cache(256)
def plan_of_queries(size: int, dtype: torch.dtype, warpgroups: bool) -> tuple[Cut, Tiles]:
    """How a head of that size is cut for the gradients of queries."""
    if dtype == torch.float64:
        return cut(size, 16, 64), Tiles(32, 16, 4, 1)
    if dtype == torch.float32:
        return cut(size, 16, 128), Tiles(64, 32, 8, 1)
    if size > (_WIDEST if warpgroups else 192):
        return cut(size, 64, _WIDEST), Tiles(64, 32, 8, 2)
    if size > 128:
        return cut(size, 0, _WIDEST), Tiles(64, 32, 4, 2)
    return cut(size, 0, _WIDEST), Tiles(128, 64 if size <= 64 else 32, 8, 2)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    wanted: list[bool],
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """``grads``: where to write to, with strides as those of readable tensors; all of them are then wanted."""
    into: tuple[Tensor | None, ...] = grads or tuple(
        torch.empty_like(tensor) if want else None for tensor, want in zip((q, k, v), wanted, strict=True)
    )
    if q.numel() == 0 or k.numel() == 0:
        for grad in into:
            if grad is not None:
                grad.zero_()
        return into
    written = tuple(None if grad is None else writable(grad) for grad in into)
    _launch(grad_out, q, k, v, out, lse, scale, written)
    for grad, got in zip(into, written, strict=True):
        if grad is not None and got is not None and grad is not got:
            grad.copy_(got)
    return into


def delta_of(grad_out: Tensor, out: Tensor) -> Tensor:
    """The product of each query's result and its gradient, which are readable."""
    batch, heads, queries, size = out.shape
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    delta = torch.empty(out.shape[:3], dtype=dtype, device=out.device)
    arguments, constants = described({"grad_out": grad_out, "out": out}, queries=queries)
    m, w = _QUERIES, _BYTES // out.element_size()
    delta_kernel[(batch * heads * triton.cdiv(queries, m),)](
        grad_out, out, delta, *arguments, heads, SIZE=size, M=m, W=w,
        LOG=w.bit_length() - 1, **constants, enable_fp_fusion=False,
    )  # fmt: skip
    return delta


def _launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    into: tuple[Tensor | None, ...],
) -> None:
    grad_out, q, k, v, out = (readable(tensor) for tensor in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    grad_q, grad_k, grad_v = into
    tensors, tokens = {"grad_out": grad_out, "q": q, "k": k, "v": v}, {"queries": queries, "keys": keys}
    with device_of(q):
        # The gradient of values alone does not read it.
        delta = lse if grad_q is None and grad_k is None else delta_of(grad_out, out)
        if grad_k is not None or grad_v is not None:
            work, tiles, together = plan_of_keys(size, q.dtype, has_warpgroups(q))
            grid = (batch * heads * work.parts * triton.cdiv(keys, tiles.keys),)
            for of_k, of_v in [(grad_k, grad_v)] if together else [(grad_k, None), (None, grad_v)]:
                if of_k is None and of_v is None:
                    continue
                of = {"grad_k": k if of_k is None else of_k, "grad_v": v if of_v is None else of_v}
                arguments, constants = described(tensors | of, **tokens)
                keys_kernel[grid](
                    grad_out, q, k, v, of_k, of_v, lse, delta, *arguments, heads, scale,
                    PARTS=work.parts, **work.constants, M=tiles.queries, N=tiles.keys, **constants,
                    num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
                )  # fmt: skip
        if grad_q is not None:
            work, tiles = plan_of_queries(size, q.dtype, has_warpgroups(q))
            arguments, constants = described(tensors | {"grad_q": grad_q}, **tokens)
            queries_kernel[(batch * heads * work.parts * triton.cdiv(queries, tiles.queries),)](
                grad_out, q, k, v, grad_q, lse, delta, *arguments, heads, scale,
                PARTS=work.parts, **work.constants, M=tiles.queries, N=tiles.keys, **constants,
                num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
            )  # fmt: skip
