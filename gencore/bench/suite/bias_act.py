"""Bias, leaky ReLU, gain and clamp as StyleGAN2 has them, and gelu, against PyTorch eager and compiled.

Outputs are fresh tensors, but for those into a given one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
# Of a leaky ReLU with gain and clamp, for which whole sums are exact enough in PyTorch too.
_SETTINGS: dict[str, Any] = {"activation": "leaky_relu", "gain": 2**0.5, "clamp": 256.0}
_SMOOTH: dict[str, Any] = {"activation": "gelu"}

Function = Callable[..., Tensor]


def _functions(settings: dict[str, Any]) -> dict[str, Function]:
    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return ops.bias_act(x, bias, **settings)

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return plain.bias_act(x, bias, **settings)

    return {"ours": ours, "eager": eager, "compile": peers.compiled(eager)}


def _inputs(case: Case, dtype: torch.dtype, device: str, grad: bool = False) -> list[Tensor]:
    x = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    return [tensor.requires_grad_(grad) for tensor in (x, torch.randn(case.shape[1], dtype=dtype, device=device))]


def _forward(settings: dict[str, Any], flops: int) -> Callable[..., Comparison]:
    def forward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
        x, bias = _inputs(case, dtype, device)
        calls = bound(_functions(settings), x, bias)
        ours = calls.pop("ours")
        return Comparison(
            {"ours": ours, **on_backends(ours, device), **calls},
            Work(nbytes=2 * x.nbytes, flops=flops * case.elements),
            largest_error(lambda: plain.bias_act(x.double(), bias.double(), **settings)),
            TOLERANCES[dtype],
        )

    return forward


def forward_into(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """What the kernel takes without the pages of a new tensor."""
    x, bias = _inputs(case, dtype, device)
    out = torch.empty_like(x)
    shape = (-1, *[1] * (x.dim() - 2))

    def eager() -> Tensor:
        torch.add(x, bias.reshape(shape), out=out)
        return torch.nn.functional.leaky_relu_(out, 0.2).mul_(2**0.5).clamp_(-256, 256)

    return Comparison(
        {"ours": lambda: ops.bias_act(x, bias, **_SETTINGS, out=out), "eager": eager},
        Work(nbytes=2 * x.nbytes, flops=5 * case.elements),
        largest_error(lambda: plain.bias_act(x.double(), bias.double(), **_SETTINGS)),
        TOLERANCES[dtype],
    )


def forward_and_backward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    args = _inputs(case, dtype, device, grad=True)
    g = torch.randn_like(args[0], requires_grad=False)
    calls = {name: gradient_call(function, args, g) for name, function in _functions(_SETTINGS).items()}
    ours = calls.pop("ours")
    eager = _functions(_SETTINGS)["eager"]
    leaves = [tensor.detach().requires_grad_() for tensor in double(*args)]
    return Comparison(
        {"ours": ours, **on_backends(ours, device), **calls},
        # Read x and write y; read y and the gradient of y and write that of x.
        Work(nbytes=5 * g.nbytes, flops=10 * case.elements),
        largest_error(gradient_call(eager, leaves, g.double())),
        TOLERANCES[dtype],
    )


def _penalty(function: Function, args: Sequence[Tensor], g: Tensor, direction: Tensor) -> Callable[[], Any]:
    """Forward, backward, and the gradient of the gradient of x along a direction, as a penalty on gradients asks."""

    def run() -> Any:
        x = args[0]
        (of_x,) = torch.autograd.grad(function(*args), x, g, create_graph=True)
        return torch.autograd.grad(of_x, (g, *args), direction, allow_unused=True, materialize_grads=True)

    return run


def _twice(settings: dict[str, Any]) -> Callable[..., Comparison]:
    def twice(case: Case, dtype: torch.dtype, device: str) -> Comparison:
        args = _inputs(case, dtype, device, grad=True)
        g = torch.randn_like(args[0]).requires_grad_()
        direction = torch.randn_like(args[0], requires_grad=False)
        functions = _functions(settings)
        # Compiled functions have no second derivative.
        calls = {name: _penalty(functions[name], args, g, direction) for name in ("ours", "eager")}
        x, bias, of_g, along = double(*args, g, direction)
        leaves = [tensor.detach().requires_grad_() for tensor in (x, bias, of_g)]
        return Comparison(
            calls,
            Work(nbytes=8 * g.nbytes, flops=20 * case.elements),
            largest_error(_penalty(functions["eager"], leaves[:2], leaves[2], along)),
            TOLERANCES[dtype],
        )

    return twice


BENCHMARKS = (
    Benchmark("bias_act", "forward", _forward(_SETTINGS, 5), cases.BIAS_ACT, _DTYPES),
    Benchmark("bias_act", "forward of gelu", _forward(_SMOOTH, 30), cases.BIAS_ACT, _DTYPES),
    Benchmark(
        "bias_act",
        "forward into a given tensor",
        forward_into,
        cases.BIAS_ACT,
        _DTYPES,
        wanted=lambda case, dtype: case.elements >= 1 << 20,
    ),
    Benchmark("bias_act", "forward and backward", forward_and_backward, cases.BIAS_ACT, _DTYPES),
    Benchmark("bias_act", "first and second derivative", _twice(_SETTINGS), cases.BIAS_ACT, _DTYPES),
    Benchmark("bias_act", "first and second derivative of gelu", _twice(_SMOOTH), cases.BIAS_ACT, _DTYPES),
)
