"""Upsampling, downsampling and filtering by the binomial filter of StyleGAN, against PyTorch's convolutions, eager and
compiled.

The filter is 4 x 4 taps, given as such; ``separable`` has the same as a row of taps. Peers are zero insertion and a
convolution of each channel by itself, as every port of these networks without custom kernels has it, and, where that is
one operation, PyTorch's transposed convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import ops
from gencore.bench import cases, peers, plain
from gencore.bench.cases import Case
from gencore.bench.limits import Work
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

_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
# Multiply-adds of an output of the square filter; when it upsamples, a quarter of its taps meets pixels.
_TAPS, _MET = 16, 4


def binomial(device: str, separable: bool = False) -> Tensor:
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device) / 8
    return row if separable else torch.outer(row, row)


def _transposed(x: Tensor, filter: Tensor) -> Tensor:
    """Upsampling as PyTorch's transposed convolution, which inserts no zeros."""
    weight = (4 * filter).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def _inputs(case: Case, dtype: torch.dtype, device: str, grad: bool = False) -> Tensor:
    x = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    return x.requires_grad_(grad)


def _peers(name: str) -> dict[str, Callable[..., Tensor]]:
    function = getattr(plain, name)
    return {"eager": function, "compile": peers.compiled(function)}


def _comparison(
    name: str, case: Case, dtype: torch.dtype, device: str, taps: int, separable: bool = False
) -> Comparison:
    x, filter = _inputs(case, dtype, device), binomial(device, separable)
    ours = functools.partial(getattr(ops, name), x, filter)
    expected = functools.partial(getattr(plain, name), *double(x, filter))
    calls: dict[str, Callable[[], Any]] = {"ours": ours, **on_backends(ours, device), **bound(_peers(name), x, filter)}
    if name == "upsample2d" and not separable:
        calls["conv_transpose2d"] = functools.partial(_transposed, x, filter)
    outputs = {"upsample2d": 4 * x.numel(), "downsample2d": x.numel() // 4}.get(name, x.numel())
    return Comparison(
        calls,
        Work(nbytes=(x.numel() + outputs) * x.element_size(), flops=2 * taps * outputs),
        largest_error(expected),
        TOLERANCES[dtype],
    )


def upsampling(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _comparison("upsample2d", case, dtype, device, _MET)


def downsampling(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _comparison("downsample2d", case, dtype, device, _TAPS)


def filtering(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _comparison("filter2d", case, dtype, device, _TAPS)


def separable(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _comparison("filter2d", case, dtype, device, _TAPS // 2, separable=True)


def with_gradient(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """Upsampling and its gradient, which is downsampling."""
    x, filter = _inputs(case, dtype, device, grad=True), binomial(device)
    g = torch.randn_like(ops.upsample2d(x.detach(), filter))
    functions: dict[str, Callable[..., Any]] = {
        "ours": ops.upsample2d,
        **_peers("upsample2d"),
        "conv_transpose2d": _transposed,
    }
    calls = {n: gradient_call(functools.partial(f, filter=filter), [x], g) for n, f in functions.items()}
    ours = calls.pop("ours")
    wide, wide_filter, wide_g = double(x, filter, g)
    expected = gradient_call(functools.partial(plain.upsample2d, filter=wide_filter), [wide], wide_g)
    return Comparison(
        {"ours": ours, **on_backends(ours, device), **calls},
        Work(nbytes=2 * (x.nbytes + g.nbytes), flops=2 * (_MET * g.numel() + _TAPS * x.numel())),
        largest_error(expected),
        TOLERANCES[dtype],
    )


def _is_a_layer(case: Case, dtype: torch.dtype) -> bool:
    return case.shape == (8, 128, 64, 64)


BENCHMARKS = (
    Benchmark("upfirdn2d", "upsampling", upsampling, cases.UPFIRDN2D, _DTYPES),
    Benchmark("upfirdn2d", "downsampling", downsampling, cases.UPFIRDN2D, _DTYPES),
    Benchmark("upfirdn2d", "filtering", filtering, cases.UPFIRDN2D, _DTYPES),
    Benchmark("upfirdn2d", "filtering, separable", separable, cases.UPFIRDN2D, _DTYPES, wanted=_is_a_layer),
    Benchmark("upfirdn2d", "upsampling, forward and backward", with_gradient, cases.UPFIRDN2D, _DTYPES),
)
