"""Attention with masks, lengths, shared heads and dropout: values, gradients and derivatives, against float64."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import subprocess
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from attention_options import KEY, SMALL, USES, Use, close, defined, small
from kernels import BACKENDS, Kernels, running
from support import same_bits
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

from gencore import Key, _cpu, explain, ops
from gencore.backends import choice
from gencore.bench import cases
from gencore.noise import reference_uniform
from gencore.ops import _general_attention

each_use = pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
each_backend = pytest.mark.parametrize("kernels", BACKENDS, indirect=True)


def skip_what_is_slow(kernels: Kernels, use: Use) -> None:
    if kernels.emulated and use not in [USES[name] for name in SMALL]:
        pytest.skip("the emulator and Triton's interpreter are slow")


@each_use
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_values_and_gradients(use, dtype, kernels):
    skip_what_is_slow(kernels, use)
    leaves = [x.requires_grad_() for x in use.tensors(dtype, kernels.device)]
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    want = defined(*exact, **use.options())
    out = ops.attention(*leaves, **use.options(kernels.device))
    assert out.dtype == dtype
    close(out, want, dtype, "out")
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(out, leaves, g.to(kernels.device))
    for name, got, of in zip("qkv", grads, torch.autograd.grad(want, exact, g.double()), strict=True):
        close(got, of, dtype, f"the gradient of {name}")
    # Without a gradient it may be another call.
    assert same_bits(ops.attention(*(x.detach() for x in leaves), **use.options(kernels.device)), out.detach())


@each_use
def test_pytorch_agrees(use):
    """Its own attention, in float64, where nothing is dropped."""
    use = use._replace(dropout=0.0)
    q, k, v = use.tensors(torch.float64)
    options = use.options()
    seen = torch.zeros(len(k), 1, q.shape[-2], k.shape[-2], dtype=torch.float64)
    if q.dim() == k.dim() == 3:
        seen = seen.squeeze(1)
    if use.causal:
        seen = seen + torch.full(seen.shape[-2:], -math.inf).triu(1)
    for b, length in enumerate(use.key_lengths or ()):
        seen[b, ..., length:] = -math.inf
    mask = options.get("mask")
    if mask is not None:
        seen = seen + (torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask)
    is_shared = q.dim() == k.dim() == 4 and q.shape[1] != k.shape[1]
    want = F.scaled_dot_product_attention(q, k, v, seen, scale=use.scale, enable_gqa=is_shared)
    close(ops.attention(q, k, v, **options), want, torch.float64)


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], list[Any]]:
    """PyTorch's own inputs for tests of its attention."""
    if importlib.util.find_spec("expecttest") is None:
        # Its tests need that package for texts that are expected, which its inputs do not.
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "expecttest", stand_in)
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (entry,) = (op for op in methods.op_db if op.name == "nn.functional.scaled_dot_product_attention")
    return lambda dtype: [s for grad in (False, True) for s in entry.sample_inputs("cpu", dtype, requires_grad=grad)]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_pytorchs_own_samples(dtype, samples):
    """All of them: values and gradients, against its attention in float64, or the definition where it drops some."""
    given = samples(dtype)
    assert len(given) >= 40
    dropped = 0
    for sample in given:
        tensors = [sample.input, *sample.args]
        dropout = sample.kwargs.get("dropout_p", 0.0)
        mask, causal = sample.kwargs.get("attn_mask"), sample.kwargs.get("is_causal", False)
        assert {*sample.kwargs} <= {"dropout_p", "attn_mask", "is_causal"}
        exact = [x.detach().double().requires_grad_() for x in tensors]
        wide = None if mask is None else mask.detach().double()
        if dropout:
            dropped += 1
            q = exact[0].expand(len(exact[1]), *exact[0].shape) if exact[0].dim() < exact[1].dim() else exact[0]
            want = defined(q, *exact[1:], mask=wide, causal=causal, dropout=dropout)
        else:
            want = F.scaled_dot_product_attention(*exact, attn_mask=wide, is_causal=causal)
        out = ops.attention(*tensors, mask=mask, causal=causal, dropout=dropout, key=KEY)
        # They reach 9, and so logits some hundreds: as many times as large are their roundings.
        close(out, want, dtype, times=4)
        if tensors[0].requires_grad:
            g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            grads = torch.autograd.grad(want, exact, g.double())
            # With such logits probabilities are 0 or 1, and gradients of q and k are what is left of terms that have
            # the roundings of the forward pass's result.
            q, k, v = (x.detach() for x in exact)
            terms = float((g.double() @ v.mT).abs().max() * max(q.abs().max(), k.abs().max())) / q.shape[-1] ** 0.5
            left = torch.finfo(dtype).eps * terms
            for got, of, besides in zip(torch.autograd.grad(out, tensors, g), grads, (left, left, 0.0), strict=True):
                close(got, of, dtype, times=4, besides=besides)
    assert 0 < dropped < len(given)


def test_few_queries_have_the_bits_of_many(kernels):
    """Those of one query, or of some whose heads share keys, which another kernel takes on the CPU."""
    if kernels.backend != "cpu":
        pytest.skip("what runs few queries on GPUs is what runs many")
    for dtype in cases.DTYPES:
        for q_heads, size, size_v in ((2, 40, 40), (6, 64, 33), (2, 3, 16)):
            generator = torch.Generator().manual_seed(size)
            q, k, v = (
                torch.randn(shape, generator=generator).to(dtype)
                for shape in ((2, q_heads, 30, size), (2, 2, 150, size), (2, 2, 150, size_v))
            )
            v = v.transpose(2, 3).contiguous().transpose(2, 3) if size == 3 else v
            mask = torch.randn(30, 150, generator=generator) > 0
            mask[0] = False
            lengths = torch.tensor([90, 150])
            bias = torch.randn(2, 1, 1, 150, generator=generator)
            for options in (
                {},
                {"mask": mask},
                {"mask": bias, "scale": -0.3},
                {"causal": True},
                {"key_lengths": lengths, "scale": 0.0},
            ):
                whole = ops.attention(q, k, v, **options)
                for few in (1, 3, 7):
                    some = {**options, "mask": mask[:few]} if options.get("mask") is mask else options
                    assert same_bits(ops.attention(q[:, :, :few], k, v, **some), whole[:, :, :few])
            # The noise counts the pairs of all queries, so that what is dropped is compared with few alone.
            dropped = ops.attention(q[:, :, :7], k, v, dropout=0.3, key=KEY)
            close(dropped, defined(q[:, :, :7], k, v, dropout=0.3), dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_few_queries_of_many_keys(dtype, threads):
    """Parts of the keys are shared out to threads: the bits are those of one thread, and of many queries."""
    generator = torch.Generator().manual_seed(0)
    for heads, key_heads, queries, keys, size, size_v in (
        (2, 1, 1, 2500, 32, 64),  # Read where they are, in three parts.
        (1, 1, 3, 1025, 30, 24),
        (9, 1, 8, 1100, 20, 33),  # More queries for a head of keys than a tile has.
        (130, 1, 1, 1030, 16, 16),
    ):
        q = torch.randn(2, heads, 20, size, generator=generator).to(dtype)
        k, v = (torch.randn(2, key_heads, keys, n, generator=generator).to(dtype) for n in (size, size_v))
        mask = torch.randn(2, 1, 1, keys, generator=generator)
        for options in ({}, {"mask": mask, "key_lengths": torch.tensor([keys, keys - 70])}, {"scale": -0.2}):
            many = ops.attention(q, k, v, **options)
            few = ops.attention(q[:, :, :queries], k, v, **options)
            assert same_bits(few, many[:, :, :queries])
            close(few, defined(q[:, :, :queries], k, v, **options), dtype)
            torch.set_num_threads(1)
            assert same_bits(ops.attention(q[:, :, :queries], k, v, **options), few)
            torch.set_num_threads(threads)


def test_a_call_like_one_before_is_the_same_call():
    """Forms that were found right are remembered: views and bits are those of the first call, and so are errors."""
    for name in ("one head, three dimensions", "all together", "shared heads", "dropout", "a dimension less"):
        use = USES[name]
        leaves, options = [x.requires_grad_() for x in use.tensors(torch.float32)], use.options()
        first = ops.attention(*leaves, **options)
        grads = torch.autograd.grad(first.sum(), leaves)
        again = ops.attention(*leaves, **options)
        assert same_bits(again.detach(), first.detach())
        for a, b in zip(torch.autograd.grad(again.sum(), leaves), grads, strict=True):
            assert same_bits(a, b)
        assert same_bits(ops.attention(*(x.detach() for x in leaves), **options), first.detach())
        if options["dropout"]:
            assert not same_bits(ops.attention(*leaves, **{**options, "key": None}).detach(), first.detach())
            with pytest.raises(TypeError, match=r"key must be a gencore\.Key or None, got int"):
                ops.attention(*leaves, **{**options, "key": 3})


def results(use: Use, dtype: torch.dtype, samples: slice = slice(None)) -> list[Tensor]:
    """The result, its gradients, those of the gradients, and the derivative along a direction."""
    leaves = [x[samples].requires_grad_() for x in use.tensors(dtype)]
    options = use.options()
    for name in ("mask", "key_lengths"):
        if name in options and len(options[name]) == len(use.tensors(dtype)[0]):
            options[name] = options[name][samples]
    options["key"] = KEY.samples(5 + (samples.start or 0))
    function = functools.partial(ops.attention, **options)
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach(), create_graph=True)
    twice = torch.autograd.grad(grads, leaves, [x.detach().cos() for x in leaves])
    plain = tuple(x.detach() for x in leaves)
    _, tangent = torch.func.jvp(function, plain, tuple(x.cos() for x in plain))
    return [x.detach() for x in (out, *grads, *twice, tangent)]


LARGE = ("all together", "one query", "one head for all", "causal, more queries")


@pytest.mark.parametrize("name", LARGE)
def test_bits_for_any_number_of_threads(name, threads):
    for dtype in (torch.float32, torch.bfloat16):
        here = results(USES[name], dtype)
        torch.set_num_threads(1)
        assert all(same_bits(a, b) for a, b in zip(here, results(USES[name], dtype), strict=True))
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bits_for_any_simd_level(name, dtype):
    with running("cpu-scalar"):
        want = results(USES[name], dtype)
    for level in _cpu.build_info()["simd_supported"]:
        # In bfloat16 the dot product has bits of its own.
        if level != "avx512_bf16" or dtype != torch.bfloat16:
            with running(f"cpu-{level}"):
                assert all(same_bits(a, b) for a, b in zip(results(USES[name], dtype), want, strict=True)), level


def test_bits_for_any_split_of_the_batch():
    for name in ("all together", "one query", "lengths", "mask of everything"):
        whole, part = results(USES[name], torch.float32), results(USES[name], torch.float32, slice(1, 2))
        assert all(same_bits(a[1:2], b) for a, b in zip(whole, part, strict=True)), name


MEMORY = """
import resource
import torch
from gencore import Key, ops
torch.set_num_threads(1)
tokens = 8192
q, k, v = (torch.randn(1, heads, tokens, 8) for heads in (2, 1, 1))
mask = torch.rand(tokens, tokens) > 0.1
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

def all_of(tokens):
    options = {"mask": mask[:tokens, :tokens], "causal": True, "key_lengths": torch.tensor([tokens - 9])}
    attend = lambda *qkv: ops.attention(*qkv, **options, dropout=0.1, key=Key(0))
    leaves = [x[:, :, :tokens].clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
    plain = tuple(x.detach() for x in leaves)
    torch.func.jvp(attend, plain, plain)
    bias = torch.zeros(tokens, requires_grad=True)
    ops.attention(*plain, mask=bias).sum().backward()

all_of(64)
before = peak()
all_of(tokens)
print(peak() - before)
"""


def test_memory_of_many_tokens():
    """8,192 of them: a byte for each pair of a head would be 64 MB, and probabilities in float32 are 256 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32


@each_use
@each_backend
def test_derivatives(use, kernels):
    """First and second, and in forward mode, against differences of values."""
    use = small(use)
    if kernels.interpreted and use != small(USES["all together"]):
        pytest.skip("Triton's interpreter is slow")
    if kernels.emulated and use not in [small(USES[name]) for name in SMALL]:
        pytest.skip("the emulator and Triton's interpreter are slow")
    leaves = [x.requires_grad_() for x in use.tensors(torch.float64, kernels.device)]
    function = functools.partial(ops.attention, **use.options(kernels.device))
    assert gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


# The shapes of masks that are learned: what they are the same for, their gradient is summed over.
MASKS = {
    "everything": (3, 4, 70, 133),
    "heads and pairs": (4, 70, 133),
    "samples and pairs": (3, 1, 70, 133),
    "pairs": (70, 133),
    "heads and keys": (4, 1, 133),
    "keys": (133,),
    "heads and queries": (4, 70, 1),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
def test_a_mask_has_a_gradient(shape, kernels):
    use = Use((3, 4, 70, 20), (3, 2, 133, 20), 9, causal=True, key_lengths=(0, 70, 133), dropout=0.2, scale=-0.4)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    if kernels.emulated:
        if shape != MASKS["heads and pairs"] and shape != MASKS["keys"]:
            pytest.skip("the emulator and Triton's interpreter are slow")
        use, shape, dtypes = small(use), tuple({70: 5, 133: 6}.get(n, n) for n in shape), dtypes[1:2]
    options = use.options(kernels.device)
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(shape, generator=generator)
    drawn = drawn.masked_fill(drawn > (1 if shape[-1] > 1 else 9), -math.inf)
    for dtype in dtypes:
        tensors = [*use.tensors(dtype, kernels.device), drawn.to(kernels.device, dtype)]
        leaves = [x.requires_grad_() for x in tensors]
        exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
        want = defined(*exact[:3], mask=exact[3], **use.options())
        g = torch.randn(want.shape, generator=generator).to(dtype)
        # No kernel of CUDA's has it.
        kept = mock.patch.object(_general_attention._mask_backward_op, "_definition", side_effect=AssertionError)
        with contextlib.nullcontext() if kernels.backend == "cuda" else kept:
            out = ops.attention(*leaves[:3], mask=leaves[3], **options)
            grads = torch.autograd.grad(out, leaves, g.to(kernels.device))
        for name, got, of in zip("qkvm", grads, torch.autograd.grad(want, exact, g.double()), strict=True):
            assert got.dtype == dtype
            close(got, of, dtype, f"the gradient of {name}")
        alone = ops.attention(*(x.detach() for x in leaves[:3]), mask=leaves[3], **options)
        assert same_bits(torch.autograd.grad(alone, leaves[3], g.to(kernels.device))[0], grads[3])


def test_bits_of_a_masks_gradient(threads):
    """For any number of threads and SIMD level; of a mask for each sample, for any split of the batch."""
    q, k, v = (torch.randn(7, 4, 70, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def grad(mask: Tensor, samples: slice = slice(None)) -> Tensor:
        leaf = mask.clone().requires_grad_()
        return torch.autograd.grad(ops.attention(q[samples], k[samples], v[samples], mask=leaf).sum(), leaf)[0]

    for shape in ((4, 70, 70), (70, 70), (7, 1, 70, 70), (70,)):
        mask = torch.randn(shape, generator=torch.Generator().manual_seed(9))
        want = grad(mask)
        torch.set_num_threads(1)
        assert same_bits(grad(mask), want)
        for level in _cpu.build_info()["simd_supported"]:
            with running(f"cpu-{level}"):
                assert same_bits(grad(mask), want)
        torch.set_num_threads(threads)
        if len(shape) == 4:
            assert same_bits(grad(mask[2:5], slice(2, 5)), want[2:5])


@each_backend
def test_derivatives_of_a_mask(kernels):
    """Second derivatives, and forward mode: the definition's."""
    if kernels.interpreted:
        pytest.skip("Triton's interpreter is slow")
    use = small(USES["mask of everything"])._replace(dropout=0.2)
    options = use.options(kernels.device)
    mask = options.pop("mask").clamp_min(-30)[:1].double().requires_grad_()
    leaves = [x.requires_grad_() for x in use.tensors(torch.float64, kernels.device)]

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ops.attention(q, k, v, mask=mask, **options)

    assert gradcheck(function, (*leaves, mask), fast_mode=True)
    assert gradgradcheck(function, (*leaves, mask), fast_mode=True)
    tensors, out = [x.detach() for x in leaves], function(*leaves, mask)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mask.detach(), torch.ones_like(mask) * mask.detach())
        tangent = forward_ad.unpack_dual(function(*tensors, dual)).tangent
    (grad,) = torch.autograd.grad(out, mask, torch.ones_like(out))
    close((grad * mask.detach()).sum(), tangent.cpu().sum(), torch.float64)


def test_a_query_that_sees_nothing_gets_nothing(kernels):
    leaves = [x.requires_grad_() for x in USES["mask of pairs"].tensors(torch.float32, kernels.device)]
    mask = torch.ones(20, 70, dtype=torch.bool, device=kernels.device)
    mask[3] = False
    for given in (mask, torch.zeros(20, 70, device=kernels.device).masked_fill(~mask, -math.inf)):
        out = ops.attention(*leaves, mask=given)
        assert bool((out[:, :, 3] == 0).all())
        grads = torch.autograd.grad(out.sum() + out[:, :, 3].exp().sum(), leaves)
        assert bool((grads[0][:, :, 3] == 0).all())
        assert not any(bool(grad.isnan().any()) for grad in grads)


def test_what_is_beyond_the_length_is_not_read(kernels):
    use = USES["lengths"]
    q, k, v = use.tensors(torch.float32, kernels.device)
    options = use.options(kernels.device)
    clean = ops.attention(q, k, v, **options)
    for b, length in enumerate(use.key_lengths):
        k[b, :, length:], v[b, :, length:] = math.nan, math.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.attention(*leaves, **options)
    assert same_bits(out.detach(), clean)
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert bool(grad.isfinite().all())


def test_what_is_dropped_is_that_of_the_key(kernels):
    """Sample by sample, by the noise's definition, for each row of a key too."""
    q = torch.zeros(3, 2, 4, 8, device=kernels.device)
    v = torch.eye(8, device=kernels.device).expand(3, 2, 8, 8)
    for key in (KEY, KEY.samples([4, 4, 9])):
        kept = ops.attention(q, v, v, dropout=0.4, key=key) > 0
        assert torch.equal(kept.cpu(), torch.from_numpy(reference_uniform((3, 2, 4, 8), key) >= 0.4))
    part = ops.attention(q[1:], v[1:], v[1:], dropout=0.4, key=KEY.samples(6))
    assert same_bits(part, ops.attention(q, v, v, dropout=0.4, key=KEY)[1:])
    torch.manual_seed(0)
    some = ops.attention(q, v, v, dropout=0.5)
    assert not same_bits(some, ops.attention(q, v, v, dropout=0.5))


@each_backend
def test_options_without_effect_change_no_bits(kernels):
    q, k, v = USES["shorter values"]._replace(size_v=40).tensors(torch.float32, kernels.device)
    want = ops.attention(q, k, v)
    close(
        ops.attention(q, k, v, mask=torch.ones(1, dtype=torch.bool, device=kernels.device)),
        want.double().cpu(),
        torch.float32,
    )
    close(
        ops.attention(q, k, v, key_lengths=torch.tensor([9, 9], device=kernels.device)),
        want.double().cpu(),
        torch.float32,
    )
    assert same_bits(ops.attention(q, k, v, key=KEY), want)
    assert same_bits(ops.attention(q[:, 0], k[:, 0], v[:, 0]), want[:, 0])
    assert same_bits(ops.attention(q, k[:1], v[:1])[0], want[0])


@pytest.mark.parametrize("layout", ["tokens", "contiguous"])
def test_layouts(layout, kernels):
    """The dimensions of the result lie in memory as the query's do."""
    q, k, v = USES["longer values"].tensors(torch.float32, kernels.device)
    dims = (0, 2, 1, 3) if layout == "tokens" else (0, 1, 3, 2)
    q, k, v = (x.permute(dims).contiguous().permute(dims) for x in (q, k, v))
    out = ops.attention(q, k, v, causal=True)
    assert out.permute(dims).is_contiguous()
    close(out, defined(*(x.cpu() for x in (q, k, v)), causal=True), torch.float32)


@each_backend
def test_opcheck(kernels):
    use = small(USES["all together"])
    q, k, v = (x.requires_grad_() for x in use.tensors(torch.float32, kernels.device))
    options = use.options(kernels.device)
    settings = (options["mask"], options["key_lengths"], KEY.packed, 0.3, True, 0.25)
    gencore = torch.ops.gencore

    def check(name: str, *args: Any) -> None:
        # The check cannot look into transforms of torch.func, which definitions of gradients are.
        if "backward" not in name or choice.has_kernel(name, q):
            torch.library.opcheck(getattr(gencore, name).default, args)

    for some in (settings, (None, None, None, 0.3, False, 0.0)):
        check("general_attention", q, k, v, *some)
        heads = [x.detach() for x in (q, k, v)]
        out, lse = gencore.general_attention(*heads, *some)
        direction, g = [torch.randn_like(x) for x in heads], torch.randn_like(out)
        check("general_attention_jvp", *heads, out, lse, *direction, *some)
        if some[0] is not None and not kernels.interpreted:
            check("general_attention_mask_backward", g, *heads, out, lse, *some, [True, False, True, True])
        for wanted in ([True] * 3, [False, True, False]):
            check("general_attention_backward", g, *heads, out, lse, *some, wanted)
            others = (None, *direction[1:], *some, [True, *wanted])
            check("general_attention_double_backward", g, *heads, out, lse, *others)


def test_compiles_whole():
    use = USES["all together"]
    leaves = [x.requires_grad_() for x in use.tensors(torch.float32)]
    options = use.options()

    def function(q: Tensor, k: Tensor, v: Tensor, key: Key) -> Tensor:
        return ops.attention(q, k, v, **{**options, "key": key}).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for key in (KEY, Key(8)):
        value, eager = compiled(*leaves, key), function(*leaves, key)
        assert torch.equal(value, eager)
        for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert torch.equal(a, b)


def test_transforms_of_torch_func():
    use = small(USES["all together"])
    q, k, v = use.tensors(torch.float64)
    options = use.options()
    function = functools.partial(ops.attention, **options)
    tangents = use.tensors(torch.float64, seed=3)
    _, tangent = torch.func.jvp(function, (q, k, v), tuple(tangents))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    g = torch.randn_like(tangent)
    grads = torch.autograd.grad(function(*leaves), leaves, g)
    along = sum((a * b).sum() for a, b in zip(grads, tangents, strict=True))
    torch.testing.assert_close((tangent * g).sum(), along)
    each = torch.func.vmap(function, in_dims=(0, None, None))(torch.stack([q, 2 * q]), k, v)
    torch.testing.assert_close(each[1], function(2 * q, k, v))
    del options["mask"]
    masks = torch.randn(2, *q.shape[:1], 1, q.shape[2], k.shape[2], dtype=torch.float64)
    of_masks = torch.func.vmap(torch.func.grad(lambda m: ops.attention(q, k, v, mask=m, **options).square().sum()))(
        masks
    )
    leaf = masks[1].clone().requires_grad_()
    want = torch.autograd.grad(ops.attention(q, k, v, mask=leaf, **options).square().sum(), leaf)[0]
    torch.testing.assert_close(of_masks[1], want)


def test_autocast():
    q, k, v = USES["all together"].tensors(torch.float32)
    options = USES["all together"].options()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, k, v, **options)
    assert out.dtype == torch.bfloat16
    assert same_bits(out, ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options))


X, Y = torch.zeros(2, 6, 5, 4), torch.zeros(2, 3, 7, 4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mask": [True]}, TypeError, "mask must be a tensor or None, got list"),
        (
            {"mask": torch.ones(5, 7, dtype=torch.int64)},
            TypeError,
            r"mask must be of torch.bool or a floating dtype, got",
        ),
        ({"mask": torch.ones(7, 5)}, ValueError, r"mask must broadcast to \(2, 6, 5, 7\), got the shape \(7, 5\)"),
        ({"mask": torch.ones(1, 2, 6, 5, 7)}, ValueError, "mask must broadcast to"),
        ({"mask": torch.ones(5, 7, device="meta")}, ValueError, "mask must be on the device of q, cpu, got meta"),
        ({"causal": 1}, TypeError, "causal must be True or False, got int"),
        ({"key_lengths": [1, 2]}, TypeError, "key_lengths must be an int64 tensor or None, got list"),
        ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must be of torch.int64, got torch.float32"),
        ({"key_lengths": torch.tensor([1])}, ValueError, r"key_lengths must have the shape \(2,\), got \(1,\)"),
        ({"dropout": "a"}, TypeError, "dropout must be a number, got str"),
        ({"dropout": 1.5}, ValueError, "dropout must be from 0 to 1, got 1.5"),
        ({"dropout": -0.1}, ValueError, "dropout must be from 0 to 1, got -0.1"),
        ({"dropout": math.nan}, ValueError, "dropout must be from 0 to 1, got nan"),
        ({"dropout": 0.5, "key": 3}, TypeError, "key must be a gencore.Key or None, got int"),
        ({"dropout": 0.5, "key": Key(0).samples([1])}, ValueError, "key must name 2 samples"),
    ],
)
def test_says_what_is_wrong(kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.attention(X, Y, Y, **kwargs)


def test_explain():
    told = str(explain(ops.attention, X, Y, Y))
    assert told.startswith("general_attention on cpu: ")
    with mock.patch.object(choice, "runner_of", return_value=None):
        told = str(explain(ops.attention, X, Y, Y, causal=True))
    assert told.startswith("general_attention on cpu: PyTorch's operations")


@each_backend
@pytest.mark.parametrize("hidden", [-1e9, torch.finfo(torch.float32).min])
def test_large_negative_numbers_hide_keys(hidden, kernels):
    """Of whole rows, as of some keys: gradients are those of a boolean mask, to the bit."""
    seen = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    seen[0, :, 2] = False
    seen = seen.to(kernels.device)
    q, k, v = (x.requires_grad_() for x in Use((2, 2, 6, 8), (2, 2, 9, 8), 8).tensors(torch.float32, kernels.device))
    g = torch.ones(2, 2, 6, 8, device=kernels.device)
    found = []
    for mask in (seen, torch.where(seen, 0.0, hidden)):
        out = ops.attention(q, k, v, mask=mask)
        found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), g)])
    for boolean, added in zip(*found, strict=True):
        assert torch.isfinite(added).all()
        torch.testing.assert_close(added, boolean, rtol=0, atol=1e-6)


def test_a_constant_mask_is_the_kernels_under_transforms():
    q, k, v = Use((1, 2, 6, 8), (1, 2, 9, 8), 8).tensors(torch.float32)
    mask = torch.randn(6, 9)
    with mock.patch.object(_general_attention._attend, "defined", side_effect=AssertionError):
        torch.func.jvp(lambda q: ops.attention(q, k, v, mask=mask), (q,), (q,))
        torch.func.grad(lambda q: ops.attention(q, k, v, mask=mask).sum())(q)
        torch.func.grad(lambda mask: ops.attention(q, k, v, mask=mask).sum())(mask)
        with pytest.raises(AssertionError):
            torch.func.jvp(lambda mask: ops.attention(q, k, v, mask=mask), (mask,), (mask,))


@each_backend
@pytest.mark.parametrize("added", [-1e4, -(2.0**25), 2.0**25])
def test_a_large_number_added_to_a_row_costs_gradients_no_digits(added, kernels):
    """Logits are multiples of 4, which float32 has beside those numbers: so all roundings are those of the softmax."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-1, 2, (1, 2, 5, 4), generator=generator).float()
    k = 4.0 * torch.randint(-1, 2, (1, 2, 9, 4), generator=generator)
    v, g = (torch.randn(1, 2, n, 3, generator=generator) for n in (9, 5))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    leaves = [x.to(kernels.device).requires_grad_() for x in (q, k, v)]
    mask = torch.zeros(5, 9)
    mask[1:3] = added
    want = defined(*exact, mask=mask.double(), scale=1.0)
    out = ops.attention(*leaves, mask=mask.to(kernels.device), scale=1.0)
    close(out, want, torch.float32)
    grads = torch.autograd.grad(want, exact, g.double(), create_graph=True)
    found = torch.autograd.grad(out, leaves, g.to(kernels.device), create_graph=kernels.backend == "cpu")
    # CUDA's kernels keep one number for each query.
    if kernels.backend != "cuda":
        for got, of in zip(found, grads, strict=True):
            close(got, of, torch.float32)
    if kernels.backend == "cpu":
        twice = torch.autograd.grad(sum(x.sum() for x in found), leaves)
        for got, of in zip(twice, torch.autograd.grad(sum(x.sum() for x in grads), exact), strict=True):
            close(got, of, torch.float32)


@each_backend
def test_tiny_scales(kernels):
    """A scale that float32 has for 0 makes a mean of the values that a query sees."""
    q, k, v = (torch.randn(1, 2, 5, 8, device=kernels.device) for _ in range(3))
    out = ops.attention(q, k, v, causal=True, scale=1e-60)
    close(out, v.double().cpu().cumsum(2) / torch.arange(1, 6)[:, None], torch.float32)


def test_a_mask_of_another_floating_dtype(kernels):
    q, k, v = Use((1, 2, 6, 8), (1, 2, 9, 8), 8).tensors(torch.bfloat16, kernels.device)
    mask = torch.randn(6, 9).half().to(kernels.device)
    assert torch.equal(ops.attention(q, k, v, mask=mask), ops.attention(q, k, v, mask=mask.float()))


def test_options_are_looked_at_after_a_call_without():
    q = torch.randn(1, 2, 5, 8)
    ops.attention(q, q, q)
    for options in ({"causal": 0}, {"causal": None}, {"dropout": False}, {"dropout": None}):
        with pytest.raises(TypeError, match=next(iter(options))):
            ops.attention(q, q, q, **options)
    with pytest.raises(ValueError, match="k must have as many heads as q, 0"):
        ops.attention(q[:, :0], q, q)
