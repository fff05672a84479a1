"""Derivatives in forward mode and of second order, of the ops that gradient penalties and flow maps go through.

The peer is PyTorch's formula that has them: of its attention, the one that keeps tokens squared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gencore import ops
from gencore.bench import cases, peers
from gencore.bench.cases import AttentionCase, Case
from gencore.bench.limits import Work
from gencore.bench.suite.base import TOLERANCES, Benchmark, Call, Comparison, double, largest_error

Function = Callable[..., Tensor]
_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
# Products of queries by keys. Along a direction: forward's two, two for the change of the logits, two for that of the
# result. Twice: two forward, five backward, and ten of the gradient's gradient, one of which makes the probabilities.
_ATTENTION_JVP, _ATTENTION_TWICE = 6, 2 + 5 + 10
# Operations per value: forward 11 and as many for its change; forward, backward 24, and the gradient of that.
_NORM_JVP, _NORM_TWICE = 2 * 11, 11 + 24 + 48


def _along(function: Function, inputs: Sequence[Tensor], directions: Sequence[Tensor]) -> Call:
    """The result and its derivative along the directions."""
    return lambda: torch.func.jvp(function, tuple(inputs), tuple(directions))


def _twice(function: Function, inputs: Sequence[Tensor], g: Tensor, directions: Sequence[Tensor]) -> Call:
    """The gradient of the gradient times the directions, that gradient being the one of the result times ``g``."""

    def run() -> Any:
        grads = torch.autograd.grad(function(*inputs), inputs, g, create_graph=True)
        return torch.autograd.grad(grads, inputs, directions)

    return run


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(tensor, requires_grad=False) for tensor in tensors]


# ------------------------------------------------------------------------------------------------ attention


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _first_head(*tensors: Tensor) -> list[Tensor]:
    return [tensor[:1, :1] for tensor in tensors]


def attention_along(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    inputs = case.tensors(dtype, device)
    directions = _like(inputs)
    some = double(*_first_head(*inputs)), double(*_first_head(*directions))
    return Comparison(
        {"ours": _along(ops.attention, inputs, directions), "eager": _along(_math, inputs, directions)},
        # What is read has a direction each, and so has what is written.
        Work(
            nbytes=2 * (2 * inputs[0].nbytes + inputs[1].nbytes + inputs[2].nbytes),
            products=_ATTENTION_JVP * case.flops,
            flops=_ATTENTION_JVP * case.flops,
        ),
        largest_error(_along(_math, *some), of=lambda result: tuple(_first_head(*result))),
        TOLERANCES[dtype],
    )


def attention_twice(case: AttentionCase, dtype: torch.dtype, device: str) -> Comparison:
    inputs = [tensor.requires_grad_() for tensor in case.tensors(dtype, device)]
    directions, g = _like(inputs), torch.randn_like(inputs[0], requires_grad=False)
    leaves, (of_result, *along) = double(*_first_head(*inputs)), double(*_first_head(g, *directions))
    return Comparison(
        {"ours": _twice(ops.attention, inputs, g, directions), "eager": _twice(_math, inputs, g, directions)},
        # Forward; the gradient, of three; and its own, which reads three directions more.
        Work(
            nbytes=8 * g.nbytes + 8 * (inputs[1].nbytes + inputs[2].nbytes),
            products=_ATTENTION_TWICE * case.flops,
            flops=_ATTENTION_TWICE * case.flops,
        ),
        largest_error(_twice(_math, leaves, of_result, along), of=lambda result: tuple(_first_head(*result))),
        TOLERANCES[dtype],
    )


def _is_kept_by_peers(case: AttentionCase) -> bool:
    """PyTorch's formula keeps several times tokens squared."""
    return case.layout == "heads" and case.queries <= 1024


ATTENTION = (
    Benchmark("attention", "forward mode", attention_along, cases.ATTENTION, _DTYPES, _is_kept_by_peers),
    Benchmark("attention", "first and second derivative", attention_twice, cases.ATTENTION, _DTYPES, _is_kept_by_peers),
)

# ------------------------------------------------------------------------------------------------ group norm


def _norms(groups: int) -> tuple[Function, Function]:
    """Ours, and PyTorch's, of an image, weight and bias, with SiLU."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm(x, groups, weight, bias, activation="silu")

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    return ours, eager


def _image(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    x = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    return [x, *torch.randn(2, case.shape[1], dtype=dtype, device=device).unbind()]


def group_norm_along(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    inputs = _image(case, dtype, device)
    directions = _like(inputs)
    ours, eager = _norms(case.groups)
    return Comparison(
        {
            "ours": _along(ours, inputs, directions),
            "eager": _along(eager, inputs, directions),
            "compile": peers.compiled(_along(eager, inputs, directions)),
        },
        Work(nbytes=4 * inputs[0].nbytes, flops=_NORM_JVP * case.elements),
        largest_error(_along(eager, double(*inputs), double(*directions))),
        TOLERANCES[dtype],
    )


def group_norm_twice(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    inputs = [tensor.detach().requires_grad_() for tensor in _image(case, dtype, device)]
    directions, g = _like(inputs), torch.randn_like(inputs[0], requires_grad=False)
    ours, eager = _norms(case.groups)
    wide, (of_result, *along) = double(*inputs), double(g, *directions)
    return Comparison(
        {"ours": _twice(ours, inputs, g, directions), "eager": _twice(eager, inputs, g, directions)},
        # Forward 2; the gradient 3; its own reads x, the result's gradient and the direction, and writes that of x.
        Work(nbytes=9 * g.nbytes, flops=_NORM_TWICE * case.elements),
        largest_error(_twice(eager, wide, of_result, along)),
        TOLERANCES[dtype],
    )


def _is_image(case: Case) -> bool:
    return len(case.shape) == 4


def _is_contiguous_image(case: Case) -> bool:
    """PyTorch's formula in forward mode refuses channels_last."""
    return _is_image(case) and case.layout == "contiguous"


def _is_wanted(case: Case, dtype: torch.dtype) -> bool:
    return case.shape in ((4, 320, 64, 64), (1, 320, 8, 8))


GROUP_NORM = tuple(
    Benchmark("group_norm", name, make, cases.GROUP_NORM, _DTYPES, fits, _is_wanted)
    for name, make, fits in (
        ("forward mode", group_norm_along, _is_contiguous_image),
        ("first and second derivative", group_norm_twice, _is_image),
    )
)
