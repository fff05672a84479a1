"""Group norm with SiLU, forward and backward, against PyTorch eager and compiled, and Liger-Kernel where there is one.

Outputs are fresh tensors, but for those into a given one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import ops
from gencore.bench import cases, peers
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.suite import _derivatives
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

# Operations per value: mean and squares 3, normalising with weight and bias 4, SiLU 4. Backward: the derivative of SiLU
# 8, sums 4, the combination 5, and forward's value again.
_FORWARD, _BACKWARD = 11, 24
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def _norm(groups: int) -> Callable[..., Tensor]:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    return norm


def _peers(norm: Callable[..., Tensor], groups: int, device: str) -> dict[str, Callable[..., Tensor]]:
    return {"eager": norm, "compile": peers.compiled(norm)} | peers.liger_group_norm(groups, device)


def _inputs(case: Case, dtype: torch.dtype, device: str, grad: bool = False) -> list[Tensor]:
    x = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    values = torch.randn(2, case.shape[1], dtype=dtype, device=device)
    return [tensor.detach().requires_grad_(grad) for tensor in (x, *values)]


def _in_channels_last(case: Case, args: list[Tensor]) -> list[Tensor] | None:
    """The same tensors, the image in the format that a user of PyTorch could change to; None where it is in it."""
    if case.layout != "contiguous" or len(case.shape) != 4:
        return None
    x, *rest = (arg.detach().requires_grad_(arg.requires_grad) for arg in args)
    moved = x.detach().to(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
    return [moved, *rest]


# Values that the definition is computed of.
_JUDGED = 1 << 22


def _some_groups(case: Case) -> int:
    """Channels of the first groups, as many as are compared: groups know nothing of each other."""
    width = case.shape[1] // case.groups
    return width * max(1, min(case.groups, _JUDGED // max(1, case.elements // case.groups)))


def _error(case: Case, args: list[Tensor], g: Tensor | None = None) -> Callable[[Any], float]:
    """Of a result, or where there is ``g`` of the gradients for the arguments."""
    channels = _some_groups(case)
    norm = _norm(channels * case.groups // case.shape[1])

    def expected() -> Any:
        x, *values = args
        some = double(x[:, :channels], *(value[:channels] for value in values))
        if g is None:
            return norm(*some)
        leaves = [tensor.detach().requires_grad_() for tensor in some]
        return gradient_call(norm, leaves, g[:, :channels].double())()

    def of(result: Any) -> Any:
        if g is None:
            return result[:, :channels]
        of_x, *of_values = result
        return of_x[:, :channels], *(value[:channels] for value in of_values)

    return largest_error(expected, of)


# The shared memory of a multiprocessor of an H200, and its cache.
_SHARED, _CACHE = 227 << 10, 60 << 20


def _reads(nbytes: int, case: Case, device: str) -> int:
    """How often x must be read: again, after its statistics, where no multiprocessor holds a group, nor a cache all."""
    of_group = nbytes // max(1, case.shape[0] * case.groups)
    return 2 if device == "cuda" and of_group > _SHARED and nbytes > _CACHE else 1


def forward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    args = _inputs(case, dtype, device)
    x, weight, bias = args
    norm = _norm(case.groups)

    def ours() -> Tensor:
        return ops.group_norm(x, case.groups, weight, bias, activation="silu")

    calls = {"ours": ours, **on_backends(ours, device)}
    calls |= bound(_peers(norm, case.groups, device), *args)
    if moved := _in_channels_last(case, args):
        calls["eager, channels_last"] = lambda: norm(*moved)
    return Comparison(
        calls,
        Work(nbytes=(_reads(x.nbytes, case, device) + 1) * x.nbytes, flops=_FORWARD * case.elements),
        _error(case, args),
        TOLERANCES[dtype],
    )


def forward_into(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """What the kernel takes without the pages of a new tensor, which PyTorch needs at least one of."""
    args = _inputs(case, dtype, device)
    x, weight, bias = args
    out = torch.empty_like(x)
    return Comparison(
        {
            "ours": lambda: ops.group_norm(x, case.groups, weight, bias, activation="silu", out=out),
            "eager": lambda: F.silu(F.group_norm(x, case.groups, weight, bias), inplace=True),
        },
        Work(nbytes=(_reads(x.nbytes, case, device) + 1) * x.nbytes, flops=_FORWARD * case.elements),
        _error(case, args),
        TOLERANCES[dtype],
    )


def forward_and_backward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    args = _inputs(case, dtype, device, grad=True)
    g = torch.randn_like(args[0])
    norm = _norm(case.groups)
    functions = {
        "ours": lambda x, weight, bias: ops.group_norm(x, case.groups, weight, bias, activation="silu"),
        **_peers(norm, case.groups, device),
    }
    calls = {name: gradient_call(function, args, g) for name, function in functions.items()}
    ours = calls.pop("ours")
    calls = {"ours": ours, **on_backends(ours, device), **calls}
    if moved := _in_channels_last(case, args):
        calls["eager, channels_last"] = gradient_call(norm, moved, g.to(memory_format=torch.channels_last))
    return Comparison(
        calls,
        # Read x and write y; read x and the gradient of y and write that of x. What is read may have to be read twice.
        Work(nbytes=(3 * _reads(g.nbytes, case, device) + 2) * g.nbytes, flops=(_FORWARD + _BACKWARD) * case.elements),
        _error(case, args, g),
        TOLERANCES[dtype],
    )


def adaptive(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """With scale and shift by an embedding, as the residual blocks of diffusion U-Nets have them."""
    x, weight, bias = _inputs(case, dtype, device)
    scale, shift = torch.randn(x.shape[0], 2 * x.shape[1], dtype=dtype, device=device).chunk(2, dim=1)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = F.group_norm(x, case.groups, weight, bias)
        return F.silu(y * (1 + scale[..., None, None]) + shift[..., None, None])

    args = x, weight, bias, scale, shift

    def ours() -> Tensor:
        return ops.group_norm(x, case.groups, weight, bias, scale=scale, shift=shift, activation="silu")

    functions = {"eager": norm, "compile": peers.compiled(norm)}
    return Comparison(
        {"ours": ours} | bound(functions, *args),
        Work(nbytes=(_reads(x.nbytes, case, device) + 1) * x.nbytes, flops=(_FORWARD + 2) * case.elements),
        largest_error(lambda: norm(*double(*args))),
        TOLERANCES[dtype],
    )


BENCHMARKS = (
    Benchmark("group_norm", "forward", forward, cases.GROUP_NORM, _DTYPES),
    Benchmark(
        "group_norm",
        "forward into a given tensor",
        forward_into,
        cases.GROUP_NORM,
        _DTYPES,
        wanted=lambda case, dtype: case.elements >= 1 << 20,
    ),
    Benchmark("group_norm", "forward and backward", forward_and_backward, cases.GROUP_NORM, _DTYPES),
    Benchmark(
        "group_norm",
        "forward with scale and shift",
        adaptive,
        cases.GROUP_NORM,
        {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)},
        fits=lambda case: len(case.shape) == 4,
        wanted=lambda case, dtype: case.shape in ((4, 320, 64, 64), (1, 320, 8, 8)),
    ),
    *_derivatives.GROUP_NORM,
)
