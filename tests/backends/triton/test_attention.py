"""Attention by Triton's kernels, on every path they can take; tests/ops has what is true of all backends."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from attention_bounds import Terms, assert_close, exact, heads_of, inputs
from support import same_bits
from torch import Tensor

from gencore.bench import cases
from gencore.bench.cases import AttentionCase

pytest.importorskip("triton")

from gencore.backends import triton as kernels
from gencore.backends.triton import _attention as common
from gencore.backends.triton import _attention_backward as backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
forward = sys.modules["gencore.backends.triton.attention"]
HALF = (torch.bfloat16, torch.float16)
# tests/ops has the small ones. The interpreter has no time for all large ones in all types, nor for the many chunks of
# long heads in float32.
SMALL = (*cases.small(cases.ATTENTION), *cases.small(cases.SPATIAL_ATTENTION))
LARGE = [case for case in SMALL if case.elements > 1024 and case.size < 512]
IN_OTHER_TYPES = [
    (torch.bfloat16, AttentionCase(1, 2, 17, 77, 40, "two parts, odd tails", layout="tokens")),
    (torch.float16, AttentionCase(1, 1, 65, 65, 80, "two parts, a second tile", layout="contiguous")),
    (torch.bfloat16, AttentionCase(1, 1, 40, 70, 160, "a second tile of keys")),
    (torch.float16, AttentionCase(2, 1, 150, 17, 20, "padding, a second tile of queries", layout="tokens")),
    (torch.bfloat16, AttentionCase(1, 1, 40, 40, 256, "DDPM's head", layout="channels_last")),
    (torch.bfloat16, AttentionCase(1, 1, 40, 40, 512, "results in parts", layout="channels_last")),
    (torch.float16, AttentionCase(1, 1, 9, 40, 576, "in chunks, results in parts, the last one padded")),
    (torch.float64, AttentionCase(1, 2, 40, 17, 8, "one padded chunk", layout="tokens")),
    (torch.float64, AttentionCase(1, 1, 40, 40, 80, "chunks, results in parts", layout="contiguous")),
]


@pytest.fixture(params=[True, False], ids=["warpgroups", "none"])
def warpgroups(request, monkeypatch):
    """Cuts heads as for one kind of GPU."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "has_warpgroups", lambda tensor: request.param)


def tensors_of(case: AttentionCase, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, which are views in the case's layout."""
    tensors = inputs(case, dtype, DEVICE)
    return tensors if len(tensors) == 3 else list(heads_of(tensors[0], case.heads))


def gradient_like(out: Tensor) -> Tensor:
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.empty_like(out).copy_(drawn)


def check(case: AttentionCase, dtype: torch.dtype) -> None:
    tensors = tensors_of(case, dtype)
    scale = 1 / math.sqrt(case.size)
    out, lse = kernels.attention(*tensors, scale)
    terms = Terms(*exact(tensors), dtype)
    assert_close(out, terms.out, "out")
    assert_close(lse, terms.lse, "lse")
    assert out.stride() == torch.empty_like(tensors[0]).stride()
    grad_out = gradient_like(out)
    grads = kernels.attention_backward(grad_out, *tensors, out, lse, scale, [True] * 3)
    for name, tensor, grad, bound in zip("qkv", tensors, grads, terms.gradients(grad_out.cpu().double()), strict=True):
        assert_close(grad, bound, f"the gradient of {name}")
        assert (grad.dtype, grad.stride()) == (dtype, torch.empty_like(tensor).stride())


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_definition(case):
    check(case, torch.float32)


@pytest.mark.parametrize(("dtype", "case"), IN_OTHER_TYPES, ids=str)
def test_definition_in_other_types(dtype, case):
    check(case, dtype)


@pytest.mark.parametrize("size", [40, 160, 256, 320])
def test_definition_on_either_kind_of_gpu(size, warpgroups):
    check(AttentionCase(1, 1, 33, 70, size, ""), torch.bfloat16)


def test_long_steps(monkeypatch):
    """Steps within a tile in 64 bits."""
    monkeypatch.setattr(common, "_LONGEST", 1 << 31)
    for layout in ("contiguous", "tokens"):
        check(AttentionCase(2, 2, 20, 20, 8, "", layout=layout), torch.float32)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 2, 3, 8), (64, 8, 1 << 30, 1)),
        ((2, 1, 8, 3), (64, 8, 1, 1 << 30)),
        ((3, 1, 2, 4), (1 << 30, 0, 8, 1)),
        ((1, 3, 4, 2), (0, 1 << 30, 1, 8)),
    ],
    ids=["tokens", "channels", "samples", "heads"],
)
def test_two_to_the_31_elements_apart(shape, strides):
    """In memory that hardly anyone touches."""
    memory = torch.empty((1 << 31) + 4096, dtype=torch.float16, device=DEVICE)

    def place(number: int) -> Tensor:
        return memory.as_strided(shape, strides, 512 * number)

    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).half().to(DEVICE) for i in range(4)]
    q, k, v, grad_out = (place(i).copy_(x) for i, x in enumerate(drawn))
    out, lse = kernels.attention(q, k, v, 0.5, place(4))
    grads = kernels.attention_backward(grad_out, q, k, v, out, lse, 0.5, [True] * 3, (place(5), place(6), place(7)))
    near_out, near_lse = kernels.attention(*drawn[:3], 0.5)
    near = kernels.attention_backward(drawn[3], *drawn[:3], near_out, near_lse, 0.5, [True] * 3)
    for got, want in zip((out, lse, *grads), (near_out, near_lse, *near), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bits_depend_on_neither_batch_nor_queries(dtype):
    q, k, v = tensors_of(AttentionCase(2, 2, 140, 40, 20, ""), dtype)
    out, lse = kernels.attention(q, k, v, 0.3)
    for samples, heads, queries in (
        (slice(1, 2), slice(0, 2), 140),
        (slice(0, 1), slice(1, 2), 33),
        (slice(1, 2),) * 2 + (1,),
    ):
        some, some_lse = kernels.attention(q[samples, heads, :queries], k[samples, heads], v[samples, heads], 0.3)
        assert same_bits(some, out[samples, heads, :queries])
        assert same_bits(some_lse, lse[samples, heads, :queries])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_layout_nor_address(dtype):
    tensors = tensors_of(AttentionCase(1, 2, 20, 33, 24, ""), dtype)
    grad_out = gradient_like(tensors[0])
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
        q, k, v = (move(x) for x in tensors)
        out, lse = kernels.attention(q, k, v, 0.2)
        assert out.stride() == torch.empty_like(q).stride()
        results.append((out, lse, *kernels.attention_backward(move(grad_out), q, k, v, out, lse, 0.2, [True] * 3)))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert same_bits(got, want)


@pytest.mark.parametrize(("queries", "keys"), [(24, 17), (17, 24)])
def test_layouts_beside_each_other(queries, keys):
    """An image that attends to a prompt, and the other way around; values apart from both."""
    q, k, v = tensors_of(AttentionCase(2, 2, queries, keys, 24, ""), torch.bfloat16)
    out, lse = kernels.attention(q, k, v, 0.2)
    grads = kernels.attention_backward(gradient_like(q), q, k, v, out, lse, 0.2, [True] * 3)
    moved = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for number in range(3):
        some = [moved[i] if i == number else x for i, x in enumerate((q, k, v))]
        got, sums = kernels.attention(*some, 0.2)
        assert same_bits(got, out)
        again = kernels.attention_backward(gradient_like(q), *some, got, sums, 0.2, [True] * 3)
        for one, other in zip(again, grads, strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("size", [8, 160])
def test_what_is_wanted(size):
    tensors = tensors_of(AttentionCase(1, 1, 17, 20, size, ""), torch.bfloat16)
    out, lse = kernels.attention(*tensors, 0.2)
    again, none = kernels.attention(*tensors, 0.2, with_lse=False)
    assert none is None
    assert same_bits(again, out)
    every = kernels.attention_backward(out, *tensors, out, lse, 0.2, [True] * 3)
    for number in range(3):
        wanted = [i == number for i in range(3)]
        grads = kernels.attention_backward(out, *tensors, out, lse, 0.2, wanted)
        for got, want, is_wanted in zip(grads, every, wanted, strict=True):
            assert same_bits(got, want) if is_wanted else got is None


@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 4), (2, 0, 3, 3, 4), (2, 1, 0, 3, 4), (2, 1, 3, 0, 4)], ids=str)
def test_nothing_to_do(shape):
    batch, heads, queries, keys, size = shape
    q = torch.ones(batch, heads, queries, size, device=DEVICE)
    k = torch.ones(batch, heads, keys, size, device=DEVICE)
    out, lse = kernels.attention(q, k, k, 1.0)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    for grad, like in zip(kernels.attention_backward(q, q, k, k, out, lse, 1.0, [True] * 3), (q, k, k), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("warpgroups", [False, True])
@pytest.mark.parametrize(
    "size", [1, 8, 16, 17, 20, 32, 40, 48, 64, 72, 80, 96, 128, 160, 192, 256, 257, 320, 512, 2000]
)
def test_cuts_cover_every_channel(dtype, warpgroups, size):
    for plan in (forward.plan, backward.plan_of_keys, backward.plan_of_queries):
        work, tiles = plan(size, dtype, warpgroups)[:2]
        c = work.constants
        assert c["SIZE"] == size
        # The last part is not empty, and where there are several, none is in two.
        assert (work.parts - 1) * c["PA"] < size <= work.parts * c["PA"] + c["PB"]
        assert work.parts == 1 or c["PB"] == 0
        if not c["CHUNKED"]:
            assert size <= c["A"] + c["B"]
            # The backward pass uses its tiles twice.
            assert plan is forward.plan or (work.parts, c["PA"], c["PB"]) == (1, c["A"], c["B"])
        for power in (c["A"], c["PA"], tiles.queries, tiles.keys, *(n for n in (c["B"], c["PB"]) if n)):
            assert power >= 16
            assert power & (power - 1) == 0
        # No more than a third is padding.
        if dtype in HALF and 32 <= size <= 256:
            assert (work.parts * c["PA"] + c["PB"]) * 2 <= 3 * size


def test_heads_of_stable_diffusion_are_hardly_padded():
    assert [sum(common.in_two(size)) for size in (40, 64, 80, 128, 160)] == [48, 64, 80, 128, 160]
