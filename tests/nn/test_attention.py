"""Attention of an image's pixels, to each other and to a context."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gencore import nn
from gencore.nn.pointwise import PointwiseConv2d, PointwiseLinear

CHANNELS, CONTEXT = 8, 6
BOTH = [nn.SpatialSelfAttention, nn.SpatialCrossAttention]
FORMATS = [torch.contiguous_format, torch.channels_last]
both_kinds = pytest.mark.parametrize("kind", BOTH, ids=["self", "cross"])
both_formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


def made(kind, heads=2, dtype=torch.float32):
    """A block with every parameter random, so that nothing is hidden behind a zero, and values of size 1."""
    more = () if kind is nn.SpatialSelfAttention else (CONTEXT,)
    block = kind(CHANNELS, *more, num_heads=heads, num_groups=4).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values / math.sqrt(CHANNELS) if parameter.dim() > 1 else values + (name == "norm.weight"))
    return block.to(dtype)


def inputs(kind, shape=(2, CHANNELS, 3, 5), dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (shape[0], 7, CONTEXT)))
    x = x.to(dtype).contiguous(memory_format=memory_format)
    return (x,) if kind is nn.SpatialSelfAttention else (x, context.to(dtype))


def formula(block, x: Tensor, context: Tensor | None = None) -> Tensor:
    h = F.group_norm(x, 4, block.norm.weight, block.norm.bias, block.norm.eps).flatten(2).transpose(1, 2)
    if context is None:
        q, k, v = (h @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=2)
    else:
        q = h @ block.q.weight.T + block.q.bias
        k, v = (context @ block.kv.weight.T + block.kv.bias).chunk(2, dim=2)
    size, mixed = CHANNELS // block.num_heads, []
    for head in range(block.num_heads):
        of_head = slice(head * size, (head + 1) * size)
        scores = q[..., of_head] @ k[..., of_head].transpose(1, 2) / math.sqrt(size)
        mixed.append(scores.softmax(dim=2) @ v[..., of_head])
    out = torch.cat(mixed, dim=2) @ block.out.weight.T + block.out.bias
    return x + out.transpose(1, 2).reshape(x.shape)


@both_kinds
@both_formats
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_block_is_its_formula(kind, memory_format, heads):
    block, given = made(kind, heads, torch.float64), inputs(kind, dtype=torch.float64, memory_format=memory_format)
    y = block(*given)
    assert y.is_contiguous(memory_format=memory_format)
    # Some hundred operations in float64, of 1e-16 each.
    torch.testing.assert_close(y, formula(block, *given), rtol=1e-12, atol=1e-12)


@both_kinds
@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_and_half(kind, memory_format, dtype):
    block, given = made(kind, dtype=dtype), inputs(kind, dtype=dtype, memory_format=memory_format)
    want = formula(made(kind, dtype=torch.float64), *(tensor.double() for tensor in given))
    # Five layers round values of size 1, each with an error of half a unit in the last place, to which weights that
    # were rounded add as much; what comes out are sums of eight of them.
    bound = 10 * math.sqrt(8) * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(block(*given).double(), want, rtol=bound, atol=bound)


@both_kinds
@pytest.mark.parametrize("shape", [(2, CHANNELS, 7), (2, CHANNELS, 3, 2, 2), (1, CHANNELS, 1, 1), (0, CHANNELS, 3, 3)])
def test_any_spatial_dimensions(kind, shape):
    block, given = made(kind, dtype=torch.float64), inputs(kind, shape, torch.float64)
    y = block(*given)
    assert y.shape == shape
    if shape[0]:
        torch.testing.assert_close(y, formula(block, *given), rtol=1e-12, atol=1e-12)


@both_kinds
@both_formats
def test_gradients(kind, memory_format):
    block, given = made(kind, dtype=torch.float64), inputs(kind, dtype=torch.float64, memory_format=memory_format)
    given = [tensor.requires_grad_() for tensor in given]
    wanted = [*given, *block.parameters()]
    got, want = (
        torch.autograd.grad(function(*given).sin().sum(), wanted)
        for function in (block, lambda *tensors: formula(block, *tensors))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


class _Copies(TorchDispatchMode):
    """Notes the ops that move a tensor of an image's size to another place or format."""

    def __init__(self):
        super().__init__()
        self.seen, self.found = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        if func.overloadpacket._qualified_op_name.rpartition("::")[2] in ("copy_", "clone", "_to_copy", "contiguous"):
            self.found.append((str(func), [tuple(a.shape) for a in args if isinstance(a, Tensor)]))
        return func(*args, **(kwargs or {}))


@both_kinds
@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_permuted(kind, memory_format, dtype):
    block, given = made(kind, dtype=dtype), inputs(kind, dtype=dtype, memory_format=memory_format)
    with torch.no_grad(), _Copies() as watched:
        y = block(*given)
    assert y.is_contiguous(memory_format=memory_format)
    assert watched.found == []
    assert watched.seen & {"gencore.spatial_attention.default", "gencore.attention.default"}


@both_kinds
@both_formats
def test_compiles_as_one_graph(kind, memory_format):
    torch._dynamo.reset()
    block, given = made(kind), inputs(kind, memory_format=memory_format)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(*given)
    assert y.is_contiguous(memory_format=memory_format)
    want = block(*given)
    # The same kernels on the same values.
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    for gradients in zip(
        *(torch.autograd.grad(of.square().sum(), list(block.parameters())) for of in (y, want)), strict=True
    ):
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@both_kinds
def test_autocast(kind):
    block, given = made(kind), inputs(kind)
    want = block(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(*given)
    # The residual is float32, and what is added to it was rounded to 8 bits some five times.
    torch.testing.assert_close(y, want, rtol=0, atol=10 * math.sqrt(8) * 2**-9)
    y.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("layer", [PointwiseLinear, PointwiseConv2d])
@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (1, 6, 1, 1), (2, 6, 1, 3)])
def test_a_pointwise_layer_is_a_convolution(layer, memory_format, dtype, shape):
    made = layer(6, 5).to(dtype)
    x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
    want = F.conv2d(x.double(), made.weight.double().reshape(5, 6, 1, 1), made.bias.double())
    y = made(x)
    assert y.is_contiguous(memory_format=memory_format)
    # A sum of seven values of size 1.
    torch.testing.assert_close(y.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert made.state_dict().keys() == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 0, 3), (0, 6, 2, 3)])
def test_a_pointwise_layer_without_pixels_or_without_any(dtype, shape):
    made = PointwiseLinear(6, 5).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    want = F.linear(x.movedim(1, -1), made.weight, made.bias).movedim(-1, 1)
    torch.testing.assert_close(made(x), want, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_context_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="context must be a tensor, got NoneType"):
        made(nn.SpatialCrossAttention)(torch.zeros(2, 8, 3, 3), None)


def test_copies_and_states():
    for kind in BOTH:
        block = made(kind)
        assert torch.equal(copy.deepcopy(block)(*inputs(kind)), block(*inputs(kind)))
    names = {f"{layer}.{value}" for layer in ("norm", "qkv", "out") for value in ("weight", "bias")}
    assert set(nn.SpatialSelfAttention(32).state_dict()) == names
    names = {f"{layer}.{value}" for layer in ("norm", "q", "kv", "out") for value in ("weight", "bias")}
    assert set(nn.SpatialCrossAttention(32, 5).state_dict()) == names
    assert "num_heads=2" in repr(made(nn.SpatialCrossAttention))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.SpatialSelfAttention(8, num_heads=3, num_groups=4), "num_heads must divide the 8 channels, got 3"),
        (lambda: nn.SpatialSelfAttention(8, num_heads=0, num_groups=4), "num_heads must divide the 8 channels, got 0"),
        (lambda: nn.SpatialCrossAttention(8, 4, num_heads=3), "num_heads must divide the 8 channels, got 3"),
        (lambda: nn.SpatialCrossAttention(32, 0), "context_channels must be at least 1, got 0"),
        (
            lambda: made(nn.SpatialCrossAttention)(torch.zeros(2, 8, 3, 3), torch.zeros(2, 4, 5)),
            "context must have the shape (2, tokens, 6), got (2, 4, 5)",
        ),
        (
            lambda: made(nn.SpatialCrossAttention)(torch.zeros(2, 8, 3, 3), torch.zeros(1, 4, 6)),
            "context must have the shape (2, tokens, 6), got (1, 4, 6)",
        ),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_symbolic_trace():
    x, context = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 6)
    itself, other = nn.SpatialSelfAttention(8, num_heads=2, num_groups=4), nn.SpatialCrossAttention(8, 6, num_groups=4)
    for module, inputs in ((itself, (x,)), (other, (x, context))):
        torch.nn.init.normal_(module.out.weight)
        assert torch.equal(torch.fx.symbolic_trace(module)(*inputs), module(*inputs))
    with pytest.raises(ValueError, match=r"context must have the shape \(2, tokens, 6\)"):
        torch.fx.symbolic_trace(other)(x, context[..., :5])
