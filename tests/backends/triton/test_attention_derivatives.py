"""Attention's forward mode and second derivative by Triton's kernels, on every path they can take.

tests/backends/test_attention_derivatives.py has what is true of all backends that have these kernels.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest
import torch
from attention_bounds import heads_of, inputs
from support import same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gencore.bench import cases
from gencore.bench.cases import AttentionCase
from gencore.ops import _attention as definitions

pytest.importorskip("triton")

from gencore.backends import triton as kernels
from gencore.backends.triton import _attention as common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = [
    sys.modules[f"gencore.backends.triton.{name}"] for name in ("_attention_tangent", "_attention_double_backward")
]
TANGENT, DOUBLE_BACKWARD = MODULES
SCALE = 0.2
# Some roundings of the type, relative to the largest value: of weights before their products, and of the result of the
# forward pass, which these go on from.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
CASES = [
    (torch.bfloat16, AttentionCase(1, 2, 17, 77, 40, "two parts, odd tails", layout="tokens")),
    (torch.float16, AttentionCase(1, 1, 65, 65, 80, "two parts, a second tile", layout="contiguous")),
    (torch.bfloat16, AttentionCase(1, 1, 140, 17, 20, "padding, a second tile of queries", layout="channels_last")),
    (torch.bfloat16, AttentionCase(1, 1, 40, 40, 160, "in chunks, results in parts, the last one padded")),
    (torch.float16, AttentionCase(1, 1, 40, 40, 256, "in chunks, results in parts", layout="channels_last")),
    (torch.float32, AttentionCase(1, 1, 20, 35, 160, "chunks of float32, results in parts", layout="contiguous")),
    (torch.float64, AttentionCase(1, 2, 40, 17, 8, "one padded chunk", layout="tokens")),
    (torch.float64, AttentionCase(1, 1, 20, 20, 80, "chunks of float64, results in parts", layout="contiguous")),
]


def tensors_of(case: AttentionCase, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """q, k, v; a direction; the gradient of the result: views in the case's layout."""
    drawn = []
    for seed in range(3):
        tensors = inputs(case, dtype, DEVICE, seed)
        drawn.append(tensors if len(tensors) == 3 else list(heads_of(tensors[0], case.heads)))
    return drawn[0], drawn[1], drawn[2][0]


def derivatives(qkv: list[Tensor], direction: list[Tensor], g: Tensor) -> list[Tensor]:
    """d_out, d_lse, and the gradients of the gradients."""
    out, lse = kernels.attention(*qkv, SCALE)
    found = kernels.attention_jvp(*qkv, out, lse, *direction, SCALE)
    return [*found, *kernels.attention_double_backward(g, *qkv, out, lse, *direction, SCALE, [True] * 4)]


def check(case: AttentionCase, dtype: torch.dtype) -> None:
    qkv, direction, g = tensors_of(case, dtype)
    got = derivatives(qkv, direction, g)
    q, k, v, g_, *dx = (x.cpu().double() for x in (*qkv, g, *direction))
    want = [
        *definitions._definition_jvp(q, k, v, None, None, *dx, SCALE),
        *definitions._definition_double_backward(g_, q, k, v, None, None, *dx, SCALE, [True] * 4),
    ]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=TOLERANCE[dtype] * float(b.abs().max()))
    for grad, tensor in zip(got[2:], (g, *qkv), strict=True):
        assert (grad.dtype, grad.stride()) == (dtype, torch.empty_like(tensor).stride())


@pytest.mark.parametrize(("dtype", "case"), CASES, ids=str)
def test_definition(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("size", [40, 96, 160])
def test_definition_on_gpus_without_warpgroups(size, monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "has_warpgroups", lambda tensor: False)
    check(AttentionCase(1, 1, 33, 70, size, ""), torch.bfloat16)


def test_long_steps(monkeypatch):
    """Steps within a tile in 64 bits."""
    monkeypatch.setattr(common, "_LONGEST", 1 << 31)
    for layout in ("contiguous", "tokens"):
        check(AttentionCase(2, 2, 20, 20, 8, "", layout=layout), torch.float32)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bits_depend_on_neither_the_batch_nor_other_queries(dtype):
    qkv, direction, g = tensors_of(AttentionCase(2, 2, 70, 40, 20, ""), dtype)
    whole = derivatives(qkv, direction, g)
    for samples, heads, queries in ((slice(1, 2), slice(0, 2), 70), (slice(0, 1), slice(1, 2), 33)):

        def some(x: Tensor, tokens: int, samples: slice = samples, heads: slice = heads) -> Tensor:
            return x[samples, heads, :tokens]

        less = [[some(x, n) for x, n in zip(xs, (queries, 40, 40), strict=True)] for xs in (qkv, direction)]
        got = derivatives(*less, some(g, queries))
        for a, b in zip(got[:4], whole, strict=False):
            assert same_bits(a, some(b, queries))
        # Those of keys are sums over queries.
        if queries == 70:
            assert all(same_bits(a, some(b, 40)) for a, b in zip(got[4:], whole[4:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_layout_nor_address(dtype):
    qkv, direction, g = tensors_of(AttentionCase(1, 2, 20, 33, 24, ""), dtype)
    results = []
    for move in (
        lambda x: x,
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        # Channels apart, and an odd address.
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
        # Heads side by side, which kernels can neither read nor write.
        lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ):
        results.append(derivatives([move(x) for x in qkv], [move(x) for x in direction], move(g)))
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


def test_results_written_where_they_are_wanted():
    """Into views whose tokens, or neither channels nor tokens, lie side by side."""
    qkv, direction, g = tensors_of(AttentionCase(1, 2, 20, 17, 8, ""), torch.float32)
    out, lse = kernels.attention(*qkv, SCALE)
    want = derivatives(qkv, direction, g)
    for move in (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), lambda x: torch.stack((x, x), -1)[..., 0]):
        into = [move(torch.full_like(x, torch.nan)) for x in (out, g, *qkv)]
        got, _ = kernels.attention_jvp(*qkv, out, lse, *direction, SCALE, into[0])
        grads = kernels.attention_double_backward(
            g, *qkv, out, lse, *direction, SCALE, [True] * 4, tuple(into[1:])
        )  # fmt: skip
        assert got is into[0]
        assert all(a is b for a, b in zip(grads, into[1:], strict=True))
        assert all(same_bits(a, b) for a, b in zip(into, (want[0], *want[2:]), strict=True))


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that PyTorch makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.nbytes += made.nbytes if isinstance(made, Tensor) else 0
        return made


def test_nothing_of_the_size_of_tokens_squared_is_allocated(monkeypatch):
    launched = []
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, mock.MagicMock())
            launched.append(getattr(module, name))
    x = torch.empty(1, 1, 16384, 64, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.empty(1, 1, 16384, device=DEVICE)
    with Allocations() as allocations:
        kernels.attention_jvp(x, x, x, x, lse, x, x, x, SCALE)
        kernels.attention_double_backward(x, x, x, x, x, lse, x, x, x, SCALE, [True] * 4)
    assert [kernel.__getitem__.call_count for kernel in launched] == [2, 1, 1]
    # Five results, and of each query the change of lse twice, and two numbers more.
    assert allocations.nbytes == 5 * x.nbytes + 4 * lse.nbytes


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("warpgroups", [False, True])
@pytest.mark.parametrize("size", [1, 8, 16, 20, 40, 64, 80, 96, 128, 160, 192, 256, 257, 320, 512, 2000])
def test_cuts_cover_every_channel(dtype, warpgroups, size):
    for plan in (TANGENT.plan_of_queries, DOUBLE_BACKWARD.plan_of_keys):
        work, tiles = plan(size, dtype, warpgroups)[:2]
        c = work.constants
        # The last part is not empty, and where there are several, none is in two.
        assert (work.parts - 1) * c["PA"] < size <= work.parts * c["PA"] + c["PB"]
        assert work.parts == 1 or c["PB"] == 0
        # Tiles that have every channel are the parts of results too.
        assert c["CHUNKED"] or (work.parts, c["PA"], c["PB"]) == (1, c["A"], c["B"])
        for power in (c["A"], c["PA"], tiles.queries, tiles.keys, *(n for n in (c["B"], c["PB"]) if n)):
            assert power >= 16
            assert power & (power - 1) == 0
