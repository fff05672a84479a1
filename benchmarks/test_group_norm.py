"""Group norm with SiLU, forward and backward, against PyTorch eager and compiled, and Liger-Kernel where there is one.

Outputs are fresh tensors, but for test_forward_into.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import ops
from gencore.bench import cases, limits
from gencore.bench.peers import compiled

CASES = cases.GROUP_NORM
ONLY = {
    "test_forward_into": lambda case: case.elements >= 1 << 20,
    "test_adaptive": lambda case: case.shape in ((4, 320, 64, 64), (1, 320, 8, 8)),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if request.config.getoption("device") == "cuda" and request.param == torch.float32:
        pytest.skip("on GPUs networks with group norm run in half precision")
    return request.param


def peers_of(groups: int, device: str) -> dict[str, Callable[..., Tensor]]:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    peers = {"eager": norm, "compile": compiled(norm)}
    if device == "cuda" and torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction

        def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.silu(LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, 1e-5))

        peers["Liger-Kernel"] = liger
    return peers


def inputs(case: cases.Case, dtype: torch.dtype, device: str, grad: bool = False) -> list[Tensor]:
    x = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    values = torch.randn(2, case.shape[1], dtype=dtype, device=device)
    return [tensor.detach().requires_grad_(grad) for tensor in (x, *values)]


def test_forward(case, dtype, device, compare, our_triton):
    args = inputs(case, dtype, device)
    x, weight, bias = args
    compare(
        lambda: ops.group_norm(x, case.groups, weight, bias, activation="silu"),
        {name: lambda peer=peer: peer(*args) for name, peer in peers_of(case.groups, device).items()}
        | our_triton("group_norm", x, case.groups, weight, bias, None, None, None, "silu", 1e-5),
        limits.memory_floor(2 * x.nbytes, device),
        "memory",
        nbytes=2 * x.nbytes,
    )


def test_forward_into(case, dtype, device, compare):
    """Into a tensor that is there: what the kernel takes, without the pages of a new tensor."""
    args = inputs(case, dtype, device)
    x, weight, bias = args
    out = torch.empty_like(x)
    compare(
        lambda: ops.group_norm(x, case.groups, weight, bias, activation="silu", out=out),
        {"copy": lambda: out.copy_(x)},
        limits.memory_floor(2 * x.nbytes, device),
        "memory",
        nbytes=2 * x.nbytes,
    )


def test_forward_and_backward(case, dtype, device, compare):
    args = inputs(case, dtype, device, grad=True)
    g = torch.randn_like(args[0])

    def through(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*args), args, g)

    # Read x and write y; read x and the gradient of y and write that of x.
    nbytes = 5 * g.nbytes
    compare(
        through(lambda x, weight, bias: ops.group_norm(x, case.groups, weight, bias, activation="silu")),
        {name: through(peer) for name, peer in peers_of(case.groups, device).items()},
        limits.memory_floor(nbytes, device),
        "memory",
        nbytes=nbytes,
    )


def test_adaptive(case, device, compare):
    """With scale and shift by an embedding, as the residual blocks of diffusion U-Nets have them."""
    x, weight, bias = inputs(case, torch.float32, device)
    scale, shift = torch.randn(x.shape[0], 2 * x.shape[1], device=device).chunk(2, dim=1)

    def norm(x: Tensor) -> Tensor:
        y = F.group_norm(x, case.groups, weight, bias)
        return F.silu(y * (1 + scale[..., None, None]) + shift[..., None, None])

    fused = compiled(norm)
    compare(
        lambda: ops.group_norm(x, case.groups, weight, bias, scale=scale, shift=shift, activation="silu"),
        {"eager": lambda: norm(x), "compile": lambda: fused(x)},
        limits.memory_floor(2 * x.nbytes, device),
        "memory",
        nbytes=2 * x.nbytes,
    )
