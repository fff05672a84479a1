"""Attention and its gradients, against the definition in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from attention_bounds import Bound, Terms, assert_close, exact, excess, heads_of, inputs
from kernels import BACKENDS, NAMES, Kernels
from support import same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from gencore import explain, ops
from gencore.backends.reference import attention as reference
from gencore.bench import cases
from gencore.bench.cases import AttentionCase

CASES = cases.small(cases.ATTENTION)
IMAGES = cases.small(cases.SPATIAL_ATTENTION)
# bfloat16 has a level of its own on processors with its dot product.
KINDS = [
    (dtype, name)
    for dtype in cases.DTYPES
    for name in (*NAMES, *(["cpu-avx512_bf16"] if dtype == torch.bfloat16 else []))
]
each_kind = pytest.mark.parametrize(("dtype", "kernels"), KINDS, indirect=["kernels"], ids=str)


def skip_what_is_slow(kernels: Kernels, unless: bool) -> None:
    """In Triton's interpreter and in the emulator, whose processor is thousands of times slower."""
    if kernels.emulated and not unless:
        pytest.skip("the emulator and Triton's interpreter are slow")


def with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The op as autograd calls it, with the log-sum-exp that it saves."""
    return torch.ops.gencore.attention(q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def normal_like(tensor: Tensor, seed: int = 9) -> Tensor:
    """Standard normal numbers in the dtype, and on the device, of a tensor."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(tensor.device, tensor.dtype)


@functools.cache
def expected(case: AttentionCase, dtype: torch.dtype) -> tuple[Terms, Tensor, tuple[Bound, ...]]:
    """For the inputs of a case: the results, the gradient at the output, and those it leads to."""
    tensors = inputs(case, dtype)
    parts = heads_of(tensors[0], case.heads) if len(tensors) == 1 else tensors
    terms = Terms(*(part.double() for part in parts), dtype)
    g = normal_like(parts[0])
    return terms, g, terms.gradients(g.double())


def check_both(tensors: list[Tensor], scale: float | None = None) -> list[Tensor]:
    """Holds forward and backward to their bounds; returns the output and the gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    terms = Terms(*exact(tensors), tensors[0].dtype, scale)
    out = ops.attention(*leaves, scale=scale)
    assert_close(out, terms.out, "out")
    g = normal_like(out)
    grads = torch.autograd.grad(out, leaves, g)
    for name, grad, bound in zip("qkv", grads, terms.gradients(g.cpu().double()), strict=True):
        assert_close(grad, bound, f"the gradient of {name}")
    return [out.detach(), *grads]


@pytest.mark.parametrize("case", CASES, ids=str)
@each_kind
def test_forward(case, dtype, kernels):
    skip_what_is_slow(kernels, unless=dtype != torch.float64 or case.elements <= 1 << 8)
    tensors = inputs(case, dtype, kernels.device)
    terms, *_ = expected(case, dtype)
    out, lse = with_lse(*tensors)
    assert_close(out, terms.out, "out")
    assert_close(lse, terms.lse, "lse")
    assert (out.dtype, lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    direct = ops.attention(*tensors)
    assert same_bits(direct, out)
    assert direct.stride() == out.stride() == torch.empty_like(tensors[0]).stride()


@pytest.mark.parametrize("case", CASES, ids=str)
@each_kind
def test_backward(case, dtype, kernels):
    skip_what_is_slow(kernels, unless=dtype != torch.float64 or case.elements <= 1 << 8)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs(case, dtype, kernels.device)]
    _, g, bounds = expected(case, dtype)
    grads = torch.autograd.grad(ops.attention(*leaves), leaves, g.to(kernels.device))
    for name, leaf, grad, bound in zip("qkv", leaves, grads, bounds, strict=True):
        assert_close(grad, bound, f"the gradient of {name}")
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(leaf).stride()


@pytest.mark.parametrize("case", IMAGES, ids=str)
@each_kind
def test_forward_of_images(case, dtype, kernels):
    skip_what_is_slow(kernels, unless=dtype != torch.float64 or case.elements <= 1 << 8)
    (image,) = inputs(case, dtype, kernels.device)
    out = ops.spatial_attention(image, case.heads)
    (got,) = heads_of(out, case.heads, parts=1)
    assert_close(got, expected(case, dtype)[0].out)
    assert out.dtype == dtype
    assert out.shape == (case.batch, case.heads * case.size, *image.shape[2:])
    assert out.is_contiguous(memory_format=case.memory_format)
    assert same_bits(out, torch.ops.gencore.spatial_attention(image, case.heads, 1 / math.sqrt(case.size))[0])


@pytest.mark.parametrize("case", IMAGES, ids=str)
@each_kind
def test_backward_of_images(case, dtype, kernels):
    skip_what_is_slow(kernels, unless=dtype != torch.float64 or case.elements <= 1 << 8)
    (image,) = (tensor.requires_grad_() for tensor in inputs(case, dtype, kernels.device))
    out = ops.spatial_attention(image, case.heads)
    _, g, bounds = expected(case, dtype)
    g = g.transpose(-1, -2).reshape(out.shape).to(kernels.device, memory_format=case.memory_format)
    (grad,) = torch.autograd.grad(out, image, g)
    for name, got, bound in zip("qkv", heads_of(grad, case.heads), bounds, strict=True):
        assert_close(got, bound, f"the gradient of {name}")
    assert grad.dtype == dtype
    assert grad.is_contiguous(memory_format=case.memory_format)


def test_the_bounds_find_faults():
    """What a careless kernel would do, in plain PyTorch: each leaves the bounds that PyTorch's own attention keeps."""
    for factor in (1, 8):
        q, k, v = inputs(AttentionCase(1, 2, 33, 40, 40, ""), torch.float32, factor=factor)
        bound = Terms(*exact([q, k, v]), torch.float32).out
        assert excess(F.scaled_dot_product_attention(q, k, v), bound) <= 1
        weights = torch.softmax(q @ k.mT / math.sqrt(40), -1)
        for fault in (
            F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1]),
            F.scaled_dot_product_attention(q.half().float(), k.half().float(), v),
            weights.half().float() @ v,
            weights @ v * (1 + 2.0**-13),
        ):
            assert excess(fault, bound) > 1
    # In half types the rounded probabilities hide small faults of small logits.
    halves = inputs(AttentionCase(1, 2, 33, 40, 40, ""), torch.bfloat16, factor=8)
    bound = Terms(*exact(halves), torch.bfloat16).out
    q, k, v = (tensor.float() for tensor in halves)
    assert excess(F.scaled_dot_product_attention(q, k, v).bfloat16(), bound) <= 1
    scaled = (q / math.sqrt(40)).bfloat16().float()
    logits = (q @ k.mT / math.sqrt(40)).bfloat16().float()
    for fault in (F.scaled_dot_product_attention(scaled, k, v, scale=1.0), torch.softmax(logits, -1) @ v):
        assert excess(fault.bfloat16(), bound) > 1


# ------------------------------------------------------------------------------------------------ special values


@each_kind
def test_large_logits(dtype, kernels):
    """Of either sign and of 1e4: one key weighs all. And 1e4 for all of them but for their differences of 1."""
    skip_what_is_slow(kernels, unless=dtype != torch.float64 and not (kernels.interpreted and dtype == torch.float16))
    case = AttentionCase(1, 2, 9, 21, 40, "", layout="tokens")
    q, k, v = inputs(case, dtype, kernels.device)
    q, k = 100 * q, 16 * k
    check_both([q, k, v])
    common = torch.zeros_like(q)
    common[..., 0] = 250.0
    q, k = q / 100 + common, k / 16 + 250.0 * (torch.arange(40, device=q.device) == 0).to(dtype)
    check_both([q, k, v])
    assert float(with_lse(q, k, v)[1].min()) > 9e3


@each_kind
@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("logit", [0.0, 1e4, -1e4])
def test_equal_logits_give_the_mean(logit, size, dtype, kernels):
    """Exactly, where the sum and the quotient are exact; else both are rounded, and the result to its type."""
    skip_what_is_slow(kernels, unless=size == 40 and logit > 0 and dtype != torch.float64)
    for keys in (64, 77):
        generator = torch.Generator().manual_seed(keys)
        v = torch.randint(-4, 5, (1, 2, keys, size), generator=generator).to(kernels.device, dtype)
        q, k = torch.zeros_like(v[:, :, :9]), torch.zeros_like(v)
        q[..., 3], k[..., 3] = 125.0, logit / 125.0
        out, lse = with_lse(q, k, v, 1.0)
        mean = v.cpu().double().mean(2, keepdim=True).expand(out.shape)
        if keys == 64:
            assert same_bits(out, mean.to(dtype))
        else:
            assert_close(out, Bound(mean, 2.0**-23 * mean.abs()))
        want = torch.full(lse.shape, logit + math.log(keys), dtype=torch.float64)
        assert_close(lse, Bound(want, 2.0**-23 * want.abs() + 2.0**-21))


@each_kind
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_one_key_gives_its_value(factor, dtype, kernels):
    skip_what_is_slow(kernels, unless=factor == 100 and dtype != torch.float64)
    for queries, size in ((1, 40), (5, 33), (70, 64)):
        q, k, v = inputs(AttentionCase(2, 2, queries, 1, size, ""), dtype, kernels.device, factor=factor)
        out, lse = with_lse(q, k, v)
        assert same_bits(out, v.expand(out.shape))
        assert_close(lse, Terms(*exact([q, k, v]), dtype).lse)
    image = inputs(AttentionCase(2, 2, 1, 1, 20, "", layout="contiguous"), dtype, kernels.device)[0]
    assert same_bits(ops.spatial_attention(image, 2), image[:, 80:])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_nothing_to_attend_to(dtype, kernels):
    q, k, v = (tensor.requires_grad_() for tensor in inputs(AttentionCase(2, 2, 5, 0, 8, ""), dtype, kernels.device))
    out, lse = with_lse(q, k, v)
    assert same_bits(out.detach(), torch.zeros_like(q))
    assert bool((lse == -math.inf).all())
    grads = torch.autograd.grad(ops.attention(q, k, v), [q, k, v], torch.ones_like(q))
    assert same_bits(grads[0], torch.zeros_like(q))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    if kernels.backend == "cpu":  # GPUs take heads of 2^30 channels at most.
        q = torch.empty(1, 1, 0, 1 << 58, dtype=dtype)
        assert ops.attention(q, q, q).shape == q.shape
    q, k, v = (tensor.requires_grad_() for tensor in inputs(AttentionCase(2, 2, 0, 5, 8, ""), dtype, kernels.device))
    for grad in torch.autograd.grad(ops.attention(q, k, v), [k, v], torch.ones_like(q)):
        assert same_bits(grad, torch.zeros_like(k))


@each_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_and_infinity(name, value, dtype, kernels):
    """What they reach becomes what the definition says, and nothing else changes: neither another head, nor another
    query, nor, where it was a value, another channel."""
    skip_what_is_slow(kernels, unless=dtype == (torch.float32 if kernels.interpreted else torch.bfloat16))
    q, k, v = inputs(AttentionCase(2, 2, 7, 19, 8, ""), dtype, kernels.device, factor=0.5)
    before = ops.attention(q, k, v)
    {"q": q, "k": k, "v": v}[name][1, 0, 5, 3] = value
    out = ops.attention(q, k, v)
    want = reference.attention(*exact([q, k, v]))[0].detach()
    got = out.cpu().double()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf())
    assert torch.equal(got.isneginf(), want.isneginf())
    # A key of weight 0 leaves the others', whose weights are then new.
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[(1, 0, *{"q": (5,), "k": (), "v": (slice(None), 3)}[name])] = True
    assert same_bits(out[~touched], before[~touched])
    finite = want.isfinite() & touched.cpu()
    if name == "k" and not math.isnan(value):
        assert bool(finite.any())
        others = [tensor[:, :, torch.arange(19, device=q.device) != 5] for tensor in (k, v)]
        other, error = Terms(*exact([q, *others]), dtype).out
        assert_close(out[1, 0].cpu()[finite[1, 0]], Bound(other[1, 0][finite[1, 0]], error[1, 0][finite[1, 0]]))
    else:
        assert not bool(finite.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_nan_in_the_backward_pass(name, dtype, kernels):
    skip_what_is_slow(kernels, unless=dtype == (torch.float32 if kernels.interpreted else torch.bfloat16))
    leaves = inputs(AttentionCase(2, 2, 7, 19, 8, ""), dtype, kernels.device)
    g = normal_like(leaves[0])
    clean = [leaf.clone().requires_grad_() for leaf in leaves]
    before = torch.autograd.grad(ops.attention(*clean), clean, g)
    dict(zip("qkvg", (*leaves, g), strict=True))[name][1, 0, 5, 3] = math.nan
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(ops.attention(*leaves), leaves, g)
    for grad, same in zip(grads, before, strict=True):
        assert same_bits(grad[0], same[0])
        assert same_bits(grad[1, 1], same[1, 1])
    query, key, value = (grad[1, 0].isnan() for grad in grads)
    # A query's own row of probabilities is NaN, or the whole of a head's; a value is in none of them.
    assert bool(query[5].all()) if name in "qg" else bool(query.all())
    assert bool(query.any(1).sum() == 1) if name in "qg" else True
    assert bool(key.all())
    assert bool(value.all()) if name in "qk" else bool(value.any() == (name == "g"))


@pytest.mark.parametrize("scale", [0.3, -1.5, 0.0, 2])
def test_scale(scale, kernels):
    case = AttentionCase(1, 2, 9, 13, 8, "")
    q, k, v = inputs(case, torch.float32, kernels.device)
    out, *_ = check_both([q, k, v], scale)
    if scale == 0:
        mean = v.cpu().double().mean(2, keepdim=True).expand(out.shape)
        assert_close(out, Bound(mean, torch.full(out.shape, 2.0**-20)))
    (image,) = inputs(AttentionCase(1, 2, 9, 9, 8, "", layout="channels_last"), torch.float32, kernels.device)
    (got,) = heads_of(ops.spatial_attention(image, 2, scale=scale), 2, parts=1)
    assert_close(got, Terms(*heads_of(*exact([image]), 2), torch.float32, scale).out)


# ------------------------------------------------------------------------------------------------ layouts


@each_kind
def test_any_strides_and_offset(dtype, kernels):
    skip_what_is_slow(kernels, unless=dtype == torch.float32 or not kernels.interpreted)
    shape = batch, heads, tokens, size = 2, 3, 9, 8

    def drawn(*shape: int) -> Tensor:
        return normal_like(torch.empty(shape, dtype=dtype, device=kernels.device), seed=len(shape))

    memory = drawn(4000)
    channels_apart = drawn(batch, 3, heads, size, tokens).transpose(-1, -2)
    layouts = {
        "tokens": drawn(batch, tokens, 3, heads, size).transpose(1, 3).unbind(2),
        "tokens first": drawn(3, tokens, batch, heads, size).permute(0, 2, 3, 1, 4).unbind(0),
        "channels apart": channels_apart.unbind(1),
        "both": (drawn(*shape), channels_apart[:, 1], channels_apart[:, 2]),
        "every third channel": drawn(3, batch, heads, tokens, 3 * size)[..., ::3].unbind(0),
        "nothing side by side": drawn(3, batch, heads, 2 * tokens, 2 * size)[..., 1::2, ::2].unbind(0),
        "unaligned": tuple(memory[n : n + 432].view(shape) for n in (1, 435, 873)),
        "unaligned tokens": memory[5 : 5 + 1296].view(batch, tokens, 3, heads, size).transpose(1, 3).unbind(2),
        "unaligned rows": drawn(3, batch, heads, tokens, size + 1)[..., 1:].unbind(0),
        "expanded": (drawn(*shape), drawn(1, 1, tokens, size).expand(shape), drawn(batch, 1, tokens, 1).expand(shape)),
        "expanded queries": (drawn(1, heads, 1, size).expand(shape), drawn(*shape), drawn(*shape)),
        "backwards": (drawn(*shape), drawn(*shape).transpose(0, 1).contiguous().transpose(0, 1), drawn(*shape)),
    }
    if kernels.interpreted:
        layouts = {name: layouts[name] for name in ("tokens", "both", "nothing side by side", "expanded")}
    for name, tensors in layouts.items():
        out, *grads = check_both(list(tensors))
        for tensor, result in zip((tensors[0], *tensors), (out, *grads), strict=True):
            assert result.stride() == torch.empty_like(tensor).stride(), name


@each_kind
def test_gradients_of_any_strides(dtype, kernels):
    """A sum hands down one number for all, a transposition behind the op its strides."""
    skip_what_is_slow(kernels, unless=dtype == torch.float32 or not kernels.interpreted)
    leaves = [t.requires_grad_() for t in inputs(AttentionCase(2, 2, 9, 9, 8, ""), dtype, kernels.device)]
    terms = Terms(*exact(leaves), dtype)
    one = torch.ones(2, 2, 9, 8, dtype=dtype, device=kernels.device)
    g = normal_like(one)
    for given, dense in ((one[:1, :1, :1, :1].expand(one.shape), one), (g.mT.contiguous().mT, g)):
        grads = torch.autograd.grad(ops.attention(*leaves), leaves, given)
        for grad, bound in zip(grads, terms.gradients(dense.cpu().double()), strict=True):
            assert_close(grad, bound)


def test_one_tensor_for_all(kernels):
    (x, _, _) = inputs(AttentionCase(1, 2, 9, 9, 8, ""), torch.float32, kernels.device)
    x.requires_grad_()
    out = ops.attention(x, x, x)
    leaves = [x.detach().clone().requires_grad_() for _ in range(3)]
    g = normal_like(out)
    each = torch.autograd.grad(ops.attention(*leaves), leaves, g)
    torch.testing.assert_close(torch.autograd.grad(out, x, g)[0], sum(each), rtol=2.0**-22, atol=2.0**-22)


@pytest.mark.parametrize("shape", [(2, 24), (2, 24, 5), (2, 24, 3, 5), (1, 24, 2, 3, 2)], ids=str)
def test_images_of_any_dimension(shape, kernels):
    """The same bits as q, k and v made of the image by hand; and what is like it has its format."""
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), [])
    for memory_format in (torch.contiguous_format, *formats):
        image = normal_like(torch.empty(shape, device=kernels.device)).contiguous(memory_format=memory_format)
        image.requires_grad_()
        out = ops.spatial_attention(image, 2)
        parts = image.detach().reshape(shape) if len(shape) > 2 else image.detach()[..., None]
        parts = [part.detach().requires_grad_() for part in heads_of(parts, 2)]
        by_hand = ops.attention(*parts)
        assert out.is_contiguous(memory_format=memory_format)
        assert same_bits(out.detach(), by_hand.detach().transpose(-1, -2).reshape(out.shape))
        g = normal_like(out).contiguous(memory_format=memory_format)
        (grad,) = torch.autograd.grad(out, image, g)
        (g_by_hand,) = heads_of(g if len(shape) > 2 else g[..., None], 2, parts=1)
        of_parts = torch.stack(torch.autograd.grad(by_hand, parts, g_by_hand), 1)
        assert grad.is_contiguous(memory_format=memory_format)
        assert same_bits(grad, of_parts.transpose(-1, -2).reshape(shape))


# ------------------------------------------------------------------------------------------------ autograd, compiler


@pytest.mark.parametrize("layout", ["heads", "tokens", "contiguous", "channels_last"])
def test_gradcheck(layout, kernels):
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is too slow for numerical gradients")
    if kernels.emulated and layout in ("heads", "contiguous"):
        pytest.skip("the emulator is slow")
    tokens = 3 if kernels.emulated else 6
    case = AttentionCase(1, 2, tokens, 4 if layout in ("heads", "tokens") else tokens, 3, "", layout=layout)
    leaves = [tensor.requires_grad_() for tensor in inputs(case, torch.float64, kernels.device)]
    if len(leaves) == 1:
        assert torch.autograd.gradcheck(lambda image: ops.spatial_attention(image, 2), leaves)
    else:
        assert torch.autograd.gradcheck(ops.attention, leaves)


@pytest.mark.parametrize("names", ["q", "k", "v", "qv", "kv"])
def test_gradients_of_some(names, kernels):
    tensors = inputs(AttentionCase(1, 2, 9, 13, 8, ""), torch.float32, kernels.device)
    every = [tensor.clone().requires_grad_() for tensor in tensors]
    g = normal_like(tensors[0])
    want = dict(zip("qkv", torch.autograd.grad(ops.attention(*every), every, g), strict=True))
    some = {n: t.clone().requires_grad_(n in names) for n, t in zip("qkv", tensors, strict=True)}
    for observed in (False, True):
        out = with_lse(*some.values())[0] if observed else ops.attention(*some.values())
        got = torch.autograd.grad(out, [some[name] for name in names], g)
        assert all(same_bits(grad, want[name]) for name, grad in zip(names, got, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize(("tokens", "layout"), [((9, 5), "tokens"), ((1, 1), "heads"), ((3, 0), "heads")], ids=str)
def test_opcheck(tokens, layout, kernels):
    if kernels.emulated and layout == "heads":
        pytest.skip("what the check sees does not depend on what runs the op")
    dtype = torch.bfloat16 if layout == "tokens" and not kernels.interpreted else torch.float32
    tensors = inputs(AttentionCase(1, 2, *tokens, 8, "", layout=layout), dtype, kernels.device)
    q, k, v = (tensor.clone().requires_grad_() for tensor in tensors)
    for some in ((q, k, v), (tensors[0], k, tensors[2]))[: 2 if layout == "tokens" else 1]:
        torch.library.opcheck(torch.ops.gencore.attention.default, (*some, 0.3))
    out, lse = with_lse(*tensors, 0.3)
    for wanted in ([True] * 3, [False, True, False]):
        args = (normal_like(out), *tensors, out, lse, 0.3, wanted)
        torch.library.opcheck(torch.ops.gencore.attention_backward.default, args)


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(2, 12, 3, 2), (1, 12, 1, 1), (2, 12), (2, 12, 5), (0, 12, 2, 2)], ids=str)
def test_opcheck_of_images(shape, kernels):
    if kernels.emulated and shape != (1, 12, 1, 1):
        pytest.skip("what the check sees does not depend on what runs the op")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if memory_format is torch.channels_last and len(shape) != 4:
            continue
        x = normal_like(torch.empty(shape, device=kernels.device)).contiguous(memory_format=memory_format)
        torch.library.opcheck(torch.ops.gencore.spatial_attention.default, (x.clone().requires_grad_(), 2, 0.3))
        out, lse = torch.ops.gencore.spatial_attention(x, 2, 0.3)
        args = (normal_like(out), x, out, lse, 2, 0.3)
        torch.library.opcheck(torch.ops.gencore.spatial_attention_backward.default, args)


def block(x: Tensor, context: Tensor, weight: Tensor) -> Tensor:
    """Self-attention of an image, and cross-attention from it to a context."""
    own = ops.spatial_attention(torch.einsum("oc,nchw->nohw", weight, x), 2)
    query = own.flatten(2).unflatten(1, (2, -1)).transpose(-1, -2)
    key, value = context.unflatten(2, (2, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return ops.attention(query, key, value, scale=0.5).square().sum()


def arguments(batch: int, height: int, tokens: int, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 6, height, 4), (batch, tokens, 12), (18, 6))
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def test_compiles_whole_and_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed in range(3):
        leaves = arguments(2, 5, 3, seed=seed)
        value, eager = compiled(*leaves), block(*leaves)
        assert torch.equal(value, eager)
        for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
def test_compiles_with_inductor_and_dynamic_shapes(kernels):
    if kernels.emulated:
        pytest.skip("the compiler sees the same op, whatever runs it")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for batch, height, tokens in ((2, 5, 3), (3, 7, 4), (3, 3, 9)):
        leaves = arguments(batch, height, tokens, kernels.device)
        value, eager = compiled(*leaves), block(*leaves)
        # The sums around the ops are the compiler's, in an order of its own.
        assert torch.allclose(value, eager, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_composes_with_vmap_and_grad_of_torch_func():
    q, k, v = torch.randn(3, 1, 2, 5, 4), *torch.randn(2, 1, 2, 6, 4)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return ops.attention(q, k, v).square().sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(q, k)
    for one, got in zip(q, each, strict=True):
        leaf = k.clone().requires_grad_()
        assert torch.allclose(got, torch.autograd.grad(loss(one, leaf), leaf)[0], rtol=1e-5, atol=1e-6)

    def of_image(image: Tensor) -> Tensor:
        return ops.spatial_attention(image, 2).square().sum()

    images = torch.randn(3, 1, 12, 2, 3)
    each = torch.func.vmap(torch.func.grad(of_image))(images)
    leaf = images[1].clone().requires_grad_()
    assert torch.allclose(each[1], torch.autograd.grad(of_image(leaf), leaf)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_autocast_takes_its_dtype(dtype):
    """As PyTorch's own attention does, which is a product of matrices."""
    tensors = inputs(AttentionCase(1, 2, 9, 9, 8, ""), dtype)
    (image,) = inputs(AttentionCase(1, 2, 9, 9, 8, "", layout="channels_last"), dtype)
    taken = torch.float64 if dtype == torch.float64 else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out, of_image = ops.attention(*leaves), ops.spatial_attention(image, 2)
        assert F.scaled_dot_product_attention(*tensors).dtype == taken
    assert out.dtype == of_image.dtype == taken
    assert same_bits(out.detach(), ops.attention(*(tensor.to(taken) for tensor in tensors)))
    assert same_bits(of_image, ops.spatial_attention(image.to(taken), 2))
    out.sum().backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves)


def test_a_tensor_that_left_its_transform():
    leaked: list[Tensor] = []
    torch.func.grad(lambda a: (leaked.append(a), a.square().sum())[1])(torch.randn(1, 2, 5, 4))
    other = torch.randn(1, 2, 5, 4, requires_grad=True)
    out = ops.attention(leaked[0], other, other)
    assert same_bits(out.detach(), ops.attention(leaked[0].clone(), other, other).detach())


# ------------------------------------------------------------------------------------------------ contract

X, M = torch.zeros(2, 3, 5, 4), torch.zeros(2, 24, 3, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], X, X), {}, TypeError, "q must be a tensor, got list"),
        ((X, None, X), {}, TypeError, "k must be a tensor, got NoneType"),
        ((X.long(), X, X), {}, TypeError, "dtype of q must be one of float32, bfloat16, float16, float64, got int64"),
        ((X, X, X.to_sparse()), {}, ValueError, "v must be a dense .* tensor, got one of layout torch.sparse_coo"),
        ((X[0, 0], X, X), {}, ValueError, r"q must have the dimensions \(B, heads, tokens, d\), or .* got 2 of them"),
        ((X, X, X[None]), {}, ValueError, r"v must have the dimensions \(B, heads, tokens, d\), or .* got 5 of them"),
        ((X[..., :0],) * 3, {}, ValueError, r"q must have at least one channel in a head, got .*\(2, 3, 5, 0\)"),
        ((X, X, X[..., :0]), {}, ValueError, r"v must have at least one channel in a head, got .*\(2, 3, 5, 0\)"),
        ((X, X[:, :2], X[:, :2]), {}, ValueError, "k must have as many heads as q, 3, or a divisor of them, got 2"),
        ((X, X[:, :0], X[:, :0]), {}, ValueError, "k must have as many heads as q, 3, or a divisor of them, got 0"),
        ((X, X, X[:, :2]), {}, ValueError, "the heads of k and v must have one size, or 1 .*, got 3 of k, 2 of v"),
        ((X, X[[0, 0, 1]], X), {}, ValueError, "the batch must have one size, .*, got 2 of q, 3 of k, 2 of v"),
        ((X, X[..., 1:], X), {}, ValueError, "k must have the head size of q, 4, got 3"),
        ((X, X, X[:, :, 1:]), {}, ValueError, "v must have as many tokens as k, 5, got 4"),
        ((X, X.double(), X), {}, TypeError, "k must have the dtype of q, torch.float32, got torch.float64"),
        ((X, X, X.bfloat16()), {}, TypeError, "v must have the dtype of q, torch.float32, got torch.bfloat16"),
        ((X, X.to("meta"), X), {}, ValueError, "k must be on the device of q, cpu, got meta"),
        ((X, X, X), {"scale": "1"}, TypeError, "scale must be a number or None, got str"),
        ((X, X, X), {"scale": True}, TypeError, "scale must be a number or None, got bool"),
        ((X, X, X), {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ((X, X, X), {"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
    ],
)
def test_says_what_is_wrong(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.attention(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], 2), {}, TypeError, "qkv must be a tensor, got list"),
        ((M.int(), 2), {}, TypeError, "dtype of qkv must be one of .*, got int32"),
        ((M.flatten(), 2), {}, ValueError, "qkv must have at least two dimensions, samples and channels, got 1"),
        ((M, 2.0), {}, TypeError, "num_heads must be an int, got float"),
        ((M, True), {}, TypeError, "num_heads must be an int, got bool"),
        ((M, 0), {}, ValueError, "num_heads must be at least 1, got 0"),
        (
            (M, 3),
            {},
            ValueError,
            "qkv must have 3 x num_heads x d channels, a multiple of 9 and at least as many, got 24",
        ),
        ((M[:, :0], 2), {}, ValueError, "a multiple of 6 and at least as many, got 0"),
        ((M, 2), {"scale": None, "out": M}, TypeError, "unexpected keyword argument 'out'"),
        ((M, 2), {"scale": [1]}, TypeError, "scale must be a number or None, got list"),
        ((M, 2), {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    ],
)
def test_says_what_is_wrong_with_an_image(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.spatial_attention(*args, **kwargs)


def test_explain():
    q, k, v = inputs(AttentionCase(2, 2, 9, 9, 8, "", layout="tokens"), torch.float32)
    told = str(explain(ops.attention, q, k, v))
    assert told.startswith("attention on cpu: cpu")
    assert "copy" not in told
    image = torch.randn(2, 24, 4, 4)
    assert str(explain(ops.spatial_attention, image, 2)).startswith("spatial_attention on cpu: cpu")
    for kept in (image, image.contiguous(memory_format=torch.channels_last)):
        assert "copy" not in str(explain(ops.spatial_attention, kept, 2))
    assert "qkv is neither contiguous nor channels_last" in str(explain(ops.spatial_attention, image[..., ::2], 2))
