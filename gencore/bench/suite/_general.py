"""Attention with what hides keys, heads that share keys, and one query per head, against PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import ops
from gencore.bench import cases, peers
from gencore.bench.cases import AttentionCase
from gencore.bench.limits import Work
from gencore.bench.suite._images import DTYPES, FORWARD, PRODUCTS, flops, is_image
from gencore.bench.suite.base import (
    TOLERANCES,
    Benchmark,
    Comparison,
    bound,
    double,
    gradient_call,
    largest_error,
    on_backends,
)


def _seen(case: AttentionCase) -> float:
    """The part of all pairs of tokens that queries see."""
    return (case.keys + 1) / (2 * case.keys) if case.hidden == "causal" else 1.0


def _attentions(case: AttentionCase, device: str) -> tuple[Any, dict[str, Any]]:
    """Ours and its peers, as functions of q, k and v."""
    mask = None
    if case.hidden == "mask":
        apart = torch.arange(case.queries, device=device).unsqueeze(-1) - torch.arange(case.keys, device=device)
        mask = apart.abs() < case.keys // 4
    is_shared, causal = case.key_heads is not None, case.hidden == "causal"

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, mask=mask, causal=causal)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=is_shared)

    return ours, {"eager": eager, "compile": peers.compiled(eager)}


def _first(case: AttentionCase, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first sample's first head of keys, with the heads of queries that share it."""
    shared = case.heads // (case.key_heads or case.heads)
    return (tensors[0][:1, :shared], *(tensor[:1, :1] for tensor in tensors[1:]))


def forward(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    q, k, v = tensors = case.tensors(dtype, device)
    attend, others = _attentions(case, device)

    def ours() -> Tensor:
        out: Tensor = attend(q, k, v)
        return out

    def expected() -> Tensor:
        out: Tensor = others["eager"](*double(*_first(case, tuple(tensors))))
        return out

    return Comparison(
        {"ours": ours, **on_backends(ours, device), **bound(others, q, k, v)},
        # Read q, k and v and write as much as q.
        Work(
            nbytes=2 * q.nbytes + k.nbytes + v.nbytes,
            products=round(FORWARD * case.flops * _seen(case)),
            flops=round(flops(case, backward=False) * _seen(case)),
        ),
        largest_error(expected, of=lambda out: _first(case, (out, out, out))[0]),
        TOLERANCES[dtype],
    )


def forward_and_backward(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    tensors = [tensor.detach().requires_grad_() for tensor in case.tensors(dtype, device)]
    attend, others = _attentions(case, device)
    g = torch.randn_like(tensors[0])

    def expected() -> Any:
        some = [tensor.requires_grad_() for tensor in double(*_first(case, tuple(tensors)))]
        return gradient_call(others["eager"], some, _first(case, (g, g, g))[0].double())()

    calls = {name: gradient_call(function, tensors, g) for name, function in others.items()}
    ours = gradient_call(attend, tensors, g)
    return Comparison(
        {"ours": ours, **on_backends(ours, device), **calls},
        # Forward; backward q, k, v and the result's gradient are read, and three gradients written.
        Work(
            nbytes=5 * g.nbytes + 3 * (tensors[1].nbytes + tensors[2].nbytes),
            products=round(PRODUCTS * case.flops * _seen(case)),
            flops=round(flops(case, backward=True) * _seen(case)),
        ),
        largest_error(expected, of=lambda grads: _first(case, grads)),
        TOLERANCES[dtype],
    )


def _wanted(case: AttentionCase, dtype: torch.dtype) -> bool:
    return dtype != torch.float16


def _learns(case: AttentionCase, dtype: torch.dtype) -> bool:
    """Tokens are made one by one in inference alone."""
    return _wanted(case, dtype) and case.queries > 1


def _is_of_heads(case: AttentionCase) -> bool:
    return not is_image(case)


_CASES = cases.GENERAL_ATTENTION
BENCHMARKS = (
    Benchmark("attention", "options, forward", forward, _CASES, DTYPES, _is_of_heads, _wanted),
    Benchmark(
        "attention", "options, forward and backward", forward_and_backward, _CASES, DTYPES, _is_of_heads, _learns
    ),
)
