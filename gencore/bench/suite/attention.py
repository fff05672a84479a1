"""Attention of dense heads and of views of a projection, against PyTorch's own and the packages that have it.

The floor is that of the products: two of queries by keys forward, five backward, one of which makes the probabilities
again that nobody keeps. The exponentials between them are not counted. Images are in ``_images.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gencore import ops
from gencore.bench import cases, peers
from gencore.bench.cases import AttentionCase
from gencore.bench.limits import Work
from gencore.bench.suite import _derivatives, _general, _images
from gencore.bench.suite._images import DTYPES, FORWARD, PRODUCTS, flops, is_image, rows_judged, wanted
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

_PINNED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def _pinned(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _on_copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())


def _peers(case: AttentionCase, tensors: Sequence[Tensor], device: str) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"eager": F.scaled_dot_product_attention}
    if case.layout == "tokens":
        found["eager, copies"] = _on_copies
    if device == "cpu":
        # On GPUs the compiler calls the same kernels.
        found["compile"] = peers.compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
        return found
    for name, backend in _PINNED.items():
        # It keeps tokens squared.
        if name == "math" and case.queries > 1024:
            continue
        candidate = _pinned(backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The reasons of a refusal are warnings.
            try:
                out = candidate(*tensors)
                if out.requires_grad:
                    torch.autograd.grad(out, tensors, torch.ones_like(out))
            except RuntimeError:
                continue
        found[name] = candidate
    return found | peers.attention_packages(tensors[0].dtype, device)


def _handed_over(call: Callable[[], Tensor], device: str) -> dict[str, Callable[[], Tensor]]:
    """Ours as the tables may hand it over to PyTorch's kernels, on a GPU."""

    def to(runner: Literal["cudnn", "flash"]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with ops.handed_to(runner):
                return call()

        return run

    return {"ours, cuDNN": to("cudnn"), "ours, flash": to("flash")} if device == "cuda" else {}


def _head(tensor: Tensor) -> Tensor:
    """The first sample's first head."""
    return tensor[:1, :1]


def forward(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    q, k, v = tensors = case.tensors(dtype, device)
    rows = rows_judged(case)

    def ours() -> Tensor:
        return ops.attention(q, k, v)

    def expected() -> Tensor:
        some = double(*(tensor.contiguous() for tensor in (_head(q)[:, :, :rows], _head(k), _head(v))))
        return F.scaled_dot_product_attention(some[0], some[1], some[2])

    calls = {"ours": ours, **on_backends(ours, device), **_handed_over(ours, device)}
    calls |= bound(_peers(case, tensors, device), q, k, v)
    return Comparison(
        calls,
        # Read q, k and v and write as much as q.
        Work(
            nbytes=2 * q.nbytes + k.nbytes + v.nbytes, products=FORWARD * case.flops, flops=flops(case, backward=False)
        ),
        largest_error(expected, of=lambda out: _head(out)[:, :, :rows]),
        TOLERANCES[dtype],
    )


def forward_and_backward(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    tensors = [tensor.detach().requires_grad_() for tensor in case.tensors(dtype, device)]
    g = torch.randn_like(tensors[0])
    rows = rows_judged(case)
    whole = rows >= case.queries

    def expected() -> Any:
        q, k, v = double(*(_head(tensor).contiguous() for tensor in tensors))
        first = q[:, :, :rows].detach().requires_grad_()
        grads = gradient_call(F.scaled_dot_product_attention, (first, k, v), _head(g)[:, :, :rows].double())()
        # Those of keys and values need every query.
        return grads if whole else (grads[0], None, None)

    def of(result: Any) -> Any:
        of_q, of_k, of_v = result
        return _head(of_q)[:, :, :rows], _head(of_k), _head(of_v)

    functions = {"ours": ops.attention, **_peers(case, tensors, device)}
    calls = {name: gradient_call(function, tensors, g) for name, function in functions.items()}
    return Comparison(
        {"ours": calls.pop("ours")} | on_backends(gradient_call(ops.attention, tensors, g), device) | calls,
        # Forward; backward q, k, v and the result's gradient are read, and three gradients written.
        Work(
            nbytes=5 * g.nbytes + 3 * (tensors[1].nbytes + tensors[2].nbytes),
            products=PRODUCTS * case.flops,
            flops=flops(case, backward=True),
        ),
        largest_error(expected, of),
        TOLERANCES[dtype],
    )


def _is_of_heads(case: AttentionCase) -> bool:
    return not is_image(case)


def _learns(case: AttentionCase, dtype: torch.dtype) -> bool:
    """Of the longest ones the pictures are decoded, not learned from; and of each case one layout."""
    return wanted(case, dtype) and case.queries < 16384 and not (case.layout == "heads" and case.queries == 4096)


BENCHMARKS = (
    Benchmark("attention", "forward", forward, cases.ATTENTION, DTYPES, _is_of_heads, wanted),
    Benchmark(
        "attention", "forward and backward", forward_and_backward, cases.ATTENTION, DTYPES, _is_of_heads, _learns
    ),
    *_derivatives.ATTENTION,
    *_images.BENCHMARKS,
    *_general.BENCHMARKS,
)
