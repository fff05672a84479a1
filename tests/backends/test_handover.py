"""Which calls of attention go to cuDNN, and that what comes back is as our kernels leave it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from kernels import running
from torch import Tensor

from gencore import explain, ops
from gencore.backends import choice, handover
from gencore.backends.reference import attention as reference

HOPPER = (9, 0)
SCALE = 0.2


@pytest.mark.parametrize(
    ("changed", "goes"),
    [
        ({}, True),
        ({"size": 128, "dtype": torch.float16}, True),
        ({"capability": (10, 0)}, True),
        ({"capability": (8, 9)}, False),
        ({"dtype": torch.float32}, False),
        ({"size": 40}, False),
        ({"size": 512}, False),
        ({"queries": 1024}, False),
        ({"keys": 77}, False),
        ({"channels_adjoin": False}, False),
    ],
    ids=str,
)
def test_the_table(changed, goes):
    call = {"capability": HOPPER, "dtype": torch.bfloat16, "size": 64, "queries": 1025, "keys": 4096}
    row = handover.takes_over(**{**call, "channels_adjoin": True, **changed})
    assert (row is not None) == goes
    assert row is None or row in handover.TABLE


def test_what_the_kernel_cannot_do_stays():
    with mock.patch.object(handover, "capability_of", return_value=HOPPER):
        q = torch.empty(1, 1, 2000, 64, dtype=torch.bfloat16)
        tokens_adjoin = torch.empty(1, 1, 64, 2000, dtype=torch.bfloat16).transpose(-1, -2)
        assert handover.row_of(q, q, q, 0.1) is not None
        assert handover.row_of(q, q, tokens_adjoin, 0.1) is None
        for scale in (0.0, -0.1):
            assert handover.row_of(q, q, q, scale) is None
    assert handover.row_of(q, q, q, 0.1) is None, "a tensor on the CPU is on no GPU"


class CudnnAttention:
    """PyTorch's op by its schema, and with the memory that it returns."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, dropout_p: float, is_causal: bool,
        mask: bool, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert (bias, dropout_p, is_causal, mask) == (None, 0.0, False, False)
        assert q.stride(3) == k.stride(3) == v.stride(3) == 1
        self.calls += 1
        out, lse = reference.attention(q.double(), k.double(), v.double(), scale)
        # Heads side by side in a token, whatever the order of q's dimensions.
        tokens = torch.empty(*(q.shape[i] for i in (0, 2, 1, 3)), dtype=q.dtype).transpose(1, 2)
        sums = lse.float().unsqueeze(-1) if with_lse else None
        return tokens.copy_(out), sums, None, None, q.shape[2], k.shape[2], None, None, None


@pytest.fixture
def cudnn() -> Iterator[CudnnAttention]:
    """Calls of more than 16 tokens go to the stand-in for PyTorch's op, from the emulator as from an H100."""
    fake = CudnnAttention()
    row = handover.TABLE[0]._replace(tokens=16)
    with (
        running("cuda") as kernels,
        mock.patch.multiple(handover, TABLE=(row,), _FEWEST=16, capability_of=lambda device: HOPPER, _cudnn=fake),
    ):
        if not kernels.emulated:
            pytest.skip("on a GPU the op itself is called")
        yield fake


def inputs(order: tuple[int, ...], queries: int = 40, keys: int = 50) -> list[Tensor]:
    """grad_out, q, k, v with their dimensions in memory in that order, but for grad_out."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, t, 64, generator=generator) for t in (queries, queries, keys, keys)]
    back = [order.index(i) for i in range(4)]
    # Rounded before it counts: the emulator's results shall be those of the same numbers.
    grad_out, *rest = (tensor.to(torch.bfloat16) for tensor in tensors)
    return [grad_out, *(tensor.permute(order).contiguous().permute(back) for tensor in rest)]


def ours(*tensors: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What our kernels make of them."""
    grad_out, q, k, v = tensors
    with mock.patch.object(handover, "TABLE", ()):
        out, lse = choice.kernel("attention", q)(q, k, v, SCALE)
        return (out, lse), choice.kernel("attention_backward", q)(grad_out, q, k, v, out, lse, SCALE, [True] * 3)


def assert_alike(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.stride() == want.stride()
    # Both are right to three roundings in bfloat16: of probabilities or ds, and of the result.
    torch.testing.assert_close(got, want, rtol=3 * 2.0**-8, atol=3 * 2.0**-8 * float(want.abs().max()))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=str)
def test_results_are_as_our_kernels_leave_them(order, cudnn):
    tensors = inputs(order)
    (out, lse), grads = ours(*tensors)
    grad_out, q, k, v = tensors
    got, got_lse = choice.kernel("attention", q)(q, k, v, SCALE)
    assert cudnn.calls == 1
    assert_alike(got, out)
    assert got_lse.shape == lse.shape
    assert got_lse.stride() == lse.stride()
    torch.testing.assert_close(got_lse, lse, rtol=0, atol=1e-5)
    # Our backward pass goes on from them.
    mine = choice.kernel("attention_backward", q)(grad_out, q, k, v, got, got_lse, SCALE, [True, False, True])
    assert mine[1] is None
    assert_alike(mine[0], grads[0])
    assert_alike(mine[2], grads[2])
    assert cudnn.calls == 1
    assert choice.kernel("attention", q)(q, k, v, SCALE, None, False)[1] is None


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_images(memory_format, cudnn):
    """Those in channels_last go, and come back where they belong; else the tokens lie side by side, and stay."""
    qkv = torch.randn(2, 3 * 128, 5, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    qkv = qkv.contiguous(memory_format=memory_format).requires_grad_()
    goes = memory_format is torch.channels_last
    notes = explain(ops.spatial_attention, qkv, 2).notes
    assert any(note.startswith("forward, it is handed over to cuDNN: ") for note in notes) == goes
    out = ops.spatial_attention(qkv, 2, scale=SCALE)
    out.backward(torch.ones_like(out))
    assert cudnn.calls == goes
    with mock.patch.object(handover, "TABLE", ()):
        mine = ops.spatial_attention(qkv.detach().requires_grad_(), 2, scale=SCALE)
        assert_alike(out.detach(), mine.detach())
        leaf = qkv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(ops.spatial_attention(leaf, 2, scale=SCALE), leaf, torch.ones_like(out))
    assert_alike(qkv.grad, grad)


def test_explain_says_it(cudnn):
    _, q, k, v = inputs((0, 1, 2, 3))
    notes = explain(ops.attention, q, k, v).notes
    assert notes == (f"forward, it is handed over to cuDNN: {handover.TABLE[0].why}",)
    assert not explain(ops.attention, q[:, :, :16], k, v).notes


def test_explain_claims_a_copy_where_there_is_one(cudnn):
    q = torch.randn(1, 2, 9, 8)
    tokens = torch.randn(1, 9, 2, 8).transpose(1, 2)
    pixels = torch.randn(1, 2, 8, 9).transpose(2, 3)
    assert not explain(ops.attention, q, tokens, pixels).notes
    scattered = torch.randn(1, 2, 18, 16)[:, :, ::2, ::2]
    (note,) = explain(ops.attention, q, q, scattered).notes
    assert note.startswith("v has neither its channels nor its tokens side by side")


def test_the_op_takes_such_calls():
    """As PyTorch's own description of it says: no memory, no values."""
    q = torch.empty(2, 3, 40, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 3, 50, 64, dtype=torch.bfloat16, device="meta")
    out, lse = handover.attention(q, k, k, SCALE, None, True)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
