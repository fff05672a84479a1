"""What PyTorch's own kernels for attention are not given, and that what comes back is as our kernels leave it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from kernels import emulated, forget_backends
from torch import Tensor

import gencore
from gencore import explain, ops
from gencore.backends import choice, cpu, dispatch, handover
from gencore.backends.dispatch import Entry, Row
from gencore.backends.reference import attention as reference

HOPPER = (9, 0)
SCALE = 0.2
SIZE = 64


class PytorchAttention:
    """In the place of PyTorch's op: what it computes, in memory such as it returns."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Any]:
        self.calls += 1
        if self.error is not None:
            raise self.error
        assert q.stride(3) == k.stride(3) == v.stride(3) == 1
        out, lse = reference.attention(q.double(), k.double(), v.double(), scale)
        # Heads side by side in a token, whatever the order of q's dimensions.
        tokens = torch.empty(*(q.shape[i] for i in (0, 2, 1, 3)), dtype=q.dtype).transpose(1, 2)
        return tokens.copy_(out), lse.float().unsqueeze(-1) if with_lse else None


def table(order: tuple[Any, ...]) -> tuple[Entry, ...]:
    """One in which calls of more than some 16 tokens are for ``order``."""
    rows = Row({"size": SIZE, "tokens": 8}, ("cuda",)), Row({"size": SIZE, "tokens": 32}, order)
    gradient = Row({"size": SIZE, "tokens": 32}, ("cuda",))
    return (
        Entry(HOPPER, "bfloat16", "forward", None, "a test", rows),
        Entry(HOPPER, "bfloat16", "backward", None, "a test", (gradient,)),
        Entry(HOPPER, "bfloat16", "second", None, "a test", (gradient._replace(order=("triton", "cuda")),)),
    )


@pytest.fixture
def cudnn() -> Iterator[PytorchAttention]:
    """The CPU as a Hopper GPU whose CUDA kernels are emulated, with a stand-in for PyTorch's op."""
    fake = PytorchAttention()
    reason = "it serves tensors on the CPU"
    with (
        emulated(),
        mock.patch.object(cpu, "refusal", return_value=reason),
        mock.patch.object(choice, "kernel", lambda op, tensor: choice.dispatched(op, tensor.device)),
        mock.patch.multiple(dispatch, _read=lambda op: table(("cudnn", "cuda")), capability_of=lambda device: HOPPER),
        mock.patch.multiple(handover, _OPS={"cudnn": fake}, _is_allowed=lambda *call: True, _failed={}),
    ):
        forget_tables()
        yield fake
    forget_tables()


def forget_tables() -> None:
    forget_backends()
    dispatch.entry_of.cache_clear()
    dispatch._row.cache_clear()


def inputs(order: tuple[int, ...], queries: int = 40, keys: int = 50) -> list[Tensor]:
    """grad_out, q, k, v with their dimensions in memory in that order, but for grad_out."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, t, SIZE, generator=generator) for t in (queries, queries, keys, keys)]
    back = [order.index(i) for i in range(4)]
    # Rounded before it counts: the emulator's results shall be those of the same numbers.
    grad_out, *rest = (tensor.to(torch.bfloat16) for tensor in tensors)
    return [grad_out, *(tensor.permute(order).contiguous().permute(back) for tensor in rest)]


def ours(*tensors: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What our kernels make of them."""
    grad_out, q, k, v = tensors
    backend = choice.load("cuda")
    out, lse = backend.attention(q, k, v, SCALE)
    return (out, lse), backend.attention_backward(grad_out, q, k, v, out, lse, SCALE, [True] * 3)


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
    told = explain(ops.spatial_attention, qkv, 2)
    assert told.chosen == ("cudnn" if goes else "cuda")
    assert told.source == "not measured: a test"
    if not goes:
        assert told.reasons["cudnn"] == "the channels of q do not lie side by side"
    out = ops.spatial_attention(qkv, 2, scale=SCALE)
    out.backward(torch.ones_like(out))
    assert cudnn.calls == goes
    leaf = qkv.detach().requires_grad_()
    with mock.patch.object(handover, "refusal", return_value="a test"):
        mine = ops.spatial_attention(leaf, 2, scale=SCALE)
        (grad,) = torch.autograd.grad(mine, leaf, torch.ones_like(out))
    assert_alike(out.detach(), mine.detach())
    assert_alike(qkv.grad, grad)


def test_explain_says_it(cudnn):
    _, q, k, v = inputs((0, 1, 2, 3))
    assert str(explain(ops.attention, q, k, v)).splitlines() == [
        "attention on cpu: cudnn, not measured: a test",
        "  not cpu: it serves tensors on the CPU",
        "  not cuda: the table has it after cudnn",
        "  not triton: the table has it after cudnn",
        "  its gradient: cuda, not measured: a test",
        "  its second derivative and forward mode: triton, not measured: a test",
    ]
    assert explain(ops.attention, q[:, :, :16], k, v).chosen == "cuda"
    assert explain(ops.group_norm, torch.zeros(1, 2, 3), 1).source == "not measured"


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.bfloat16, "triton"), (torch.float32, "cuda")], ids=str)
def test_explain_of_second_derivatives(cudnn, dtype, chosen):
    """Of heads and of images: by the table where it has the type."""
    q, lse = torch.zeros(1, 2, 30, 4, dtype=dtype), torch.zeros(1, 2, 30)
    image, out = torch.zeros(1, 24, 30, dtype=dtype), torch.zeros(1, 8, 30, dtype=dtype)
    attention = torch.ops.gencore
    for op, args in (
        (attention.attention_jvp, (q, q, q, q, lse, q, None, None, SCALE)),
        (attention.attention_double_backward, (q, q, q, q, q, lse, q, None, None, SCALE, [True] * 4)),
        (attention.spatial_attention_jvp, (image, out, lse, image, 2, SCALE)),
        (attention.spatial_attention_double_backward, (out, image, out, lse, image, 2, SCALE)),
    ):
        told = explain(op.default, *args)
        assert told.chosen == chosen
        assert told.source == ("not measured: a test" if chosen == "triton" else "not measured")


def test_explain_of_a_kernel_that_the_first_backend_lacks(cudnn):
    x, statistics = torch.zeros(1, 2, 3), torch.zeros(1, 1, 2)
    with mock.patch.object(choice, "runner_of", return_value="triton"):
        told = explain(torch.ops.gencore.group_norm_jvp.default, x, statistics, 1, *[None] * 11, None, 1e-5)
    assert told.chosen == "triton"
    assert told.reasons["cuda"] == "it has no kernel for it"


def test_explain_of_what_writes_to_a_tensor(cudnn):
    x, key = torch.zeros(2, 3, 4), gencore.Key(1)
    schedule, row = gencore.diffusion.linear(10), ops.step_coefficients(x=1.0)
    calls = (
        (ops.normal, (x.shape, key), {}),
        (ops.uniform, (x.shape, key), {}),
        (ops.add_noise, (x, 3, schedule, key), {}),
        (ops.diffusion_step, (x, x, row, key), {}),
        (ops.group_norm, (x, 1), {}),
    )
    for op, args, options in calls:
        told = explain(op, *args, **options, out=torch.empty_like(x))
        assert (told.chosen, told.source) == ("cuda", "not measured"), op


def test_a_named_backend_hands_nothing_over(cudnn):
    _, q, k, v = inputs((0, 1, 2, 3))
    with gencore.backend("cuda"):
        told = explain(ops.attention, q, k, v)
    assert (told.chosen, told.source) == ("cuda", None)


@pytest.mark.parametrize("gone", [True, False])
def test_who_fails_is_not_asked_again(gone, cudnn):
    """A call of the same kind, that is; with any batch, as that shall not change a sample's bits."""
    tensors = inputs((0, 1, 2, 3))
    (out, _), _ = ours(*tensors)
    _, q, k, v = tensors
    cudnn.error = RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.\n")
    assert torch.equal(choice.kernel("attention", q)(q, k, v, SCALE)[0], out)
    assert cudnn.calls == 1
    cudnn.error = None
    assert explain(ops.attention, q, k, v).reasons["cudnn"] == (
        "it failed: cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph."
    )
    if gone:
        assert torch.equal(choice.kernel("attention", q)(q[:1], k[:1], v[:1], SCALE)[0], out[:1])
        assert cudnn.calls == 1
    else:
        choice.kernel("attention", q)(q[:, :, :39], k, v, SCALE)
        assert cudnn.calls == 2


def test_what_a_gpu_lacks_the_memory_for_is_said(cudnn):
    _, q, k, v = inputs((0, 1, 2, 3))
    cudnn.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        choice.kernel("attention", q)(q, k, v, SCALE)
    assert not handover._failed


def test_what_they_cannot_do_is_refused():
    q = torch.empty(2, 2, 40, SIZE, dtype=torch.bfloat16)
    tokens_adjoin = torch.empty(2, 2, SIZE, 40, dtype=torch.bfloat16).transpose(-1, -2)
    wide = torch.empty(2, 2, 40, SIZE + 4, dtype=torch.bfloat16)[..., :SIZE]
    shifted = torch.empty(2 * 2 * 40 * SIZE + 1, dtype=torch.bfloat16)[1:].view(q.shape)
    expanded = q[:, :1].expand(2, 2, 40, SIZE)
    short = torch.empty(2, 2, 40, 20, dtype=torch.bfloat16)
    with mock.patch.object(handover, "_is_allowed", return_value=True):
        refusals = {
            None: (q, q, q, 0.1),
            "scale is not positive": (q, q, q, 0.0),
            "it serves half types": (q.float(), q.float(), q.float(), 0.1),
            "the channels of a head are no multiple of 8": (short, short, short, 0.1),
            "k is empty": (q, q[:, :, :0], q, 0.1),
            "the channels of v do not lie side by side": (q, q, tokens_adjoin, 0.1),
            "an address is no multiple of 16 bytes": (q, shifted, q, 0.1),
            "k is expanded": (q, expanded, q, 0.1),
            "a stride of v is no multiple of 8": (q, q, wide, 0.1),
        }
        for reason, call in refusals.items():
            assert handover.refusal("cudnn", *call) == reason
        # The stride of a dimension of one element says nothing.
        one = torch.empty(1, 1, 40, SIZE, dtype=torch.bfloat16).as_strided((1, 1, 40, SIZE), (3, 5, SIZE, 1))
        assert handover.refusal("cudnn", one, one, one, 0.1) is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch asks the GPU that it is built for")
@pytest.mark.parametrize("runner", handover.RUNNERS)
def test_pytorch_has_a_word(runner):
    """There is no GPU for these tensors, so it says no; with the arguments it takes."""
    q = torch.empty(2, 2, 40, SIZE, dtype=torch.bfloat16)
    assert handover.refusal(runner, q, q, q, 0.1) == "PyTorch does not allow it here"


@pytest.mark.parametrize("runner", handover.RUNNERS)
def test_the_ops_take_such_calls(runner):
    """As PyTorch's own description of them says: no memory, no values."""
    q = torch.empty(2, 3, 40, SIZE, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 3, 50, SIZE, dtype=torch.bfloat16, device="meta")
    out, lse = handover.attention(runner, q, k, k, SCALE, None, True)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)


def test_explain_claims_a_copy_where_there_is_one(cudnn):
    q = torch.randn(1, 2, 9, 8)
    tokens = torch.randn(1, 9, 2, 8).transpose(1, 2)
    pixels = torch.randn(1, 2, 8, 9).transpose(2, 3)
    assert not explain(ops.attention, q, tokens, pixels).notes
    scattered = torch.randn(1, 2, 18, 16)[:, :, ::2, ::2]
    (note,) = explain(ops.attention, q, q, scattered).notes
    assert note.startswith("v has neither its channels nor its tokens side by side")


def gpu_views() -> dict[str, tuple[Tensor, ...]]:
    """q, k, v of (1, 2, 1100, 64) as PyTorch's kernels take them, and as they must not be given them."""
    shape, count = (1, 2, 1100, SIZE), 2 * 1100 * SIZE

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(3, *shape).unbind(0)
    return {
        "dense": (q, k, v),
        "tokens": tuple(normal(1, 1100, 3, 2, SIZE).transpose(1, 3).unbind(2)),
        "shifted": (q, normal(count + 1)[1:].view(shape), v),
        "wide": (q, k, normal(1, 2, 1100, SIZE + 4)[..., :SIZE]),
        "expanded": (q, k[:, :1].expand(shape), v),
        "columns": (q, normal(1, 2, SIZE, 1100).transpose(2, 3), v),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["cudnn", "flash"])
@pytest.mark.parametrize("name", ["dense", "tokens", "shifted", "wide", "expanded", "columns"])
def test_on_a_gpu(name, runner):
    q, k, v = gpu_views()[name]
    refusal = handover.refusal(runner, q, k, v, SCALE)
    assert (refusal is None) == (name in ("dense", "tokens")), refusal
    want, want_lse = reference.attention(q.double(), k.double(), v.double(), SCALE)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    whole = Row({"size": SIZE, "tokens": 1024}, (runner, "cuda", "triton"))
    entry = Entry(torch.cuda.get_device_capability(), "bfloat16", "forward", None, "a test", (whole,))
    with mock.patch.object(dispatch, "_read", return_value=(entry,)):
        forget_tables()
        assert explain(ops.attention, q, k, v).chosen == (runner if refusal is None else "cuda")
        out = ops.attention(*leaves, scale=SCALE)
    forget_tables()
    bound = 3 * 2.0**-8 * float(want.abs().max())
    torch.testing.assert_close(out.double(), want, rtol=0, atol=bound)
    if refusal is None:
        _, lse = handover.attention(runner, q, k, v, SCALE)
        torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-3)
    # Our gradient goes on from what it left.
    doubles = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    exact = reference.attention(*doubles, SCALE)[0].sum()
    for got, right in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(exact, doubles), strict=True):
        # Roundings of p and ds to bfloat16, in sums of as many terms as there are tokens, which they average out in.
        limit = 2.0**-5 * float(right.abs().max())
        torch.testing.assert_close(got.double(), right, rtol=0, atol=limit)
