"""The CUDA kernels of attention with options, on a GPU or in the emulator: what the tests of the op do not hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from attention_options import KEY
from kernels import EmulatedOps, Kernels, running
from support import same_bits
from torch import Tensor

from gencore.backends import choice, cuda
from gencore.backends.reference import attention as reference

pytestmark = pytest.mark.gpu(or_emulator=True)
SCALE = 0.3


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with running("cuda") as found:
        yield found


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Queries, keys, values and the gradient of the results; the last two shapes are made of the others."""
    (batch, heads, queries, _), (_, shared, keys, _), (size_v,) = shapes
    generator = torch.Generator().manual_seed(0)
    made = (*shapes[:2], (batch, shared, keys, size_v), (batch, heads, queries, size_v))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in made]


def results(
    tensors: list[Tensor],
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    key: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> list[Tensor]:
    """The output, its log-sum-exp and the gradients."""
    *heads, grad_out = tensors
    settings = (mask, lengths, key, SCALE, causal, dropout)
    out, lse = choice.kernel("general_attention", grad_out)(*heads, *settings)
    backward = choice.kernel("general_attention_backward", grad_out)
    return [out, lse.sum(0), *backward(grad_out, *heads, out, lse, *settings, [True] * 3)]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for one, expected in zip(got, want, strict=True):
        assert same_bits(one, expected)


def everything(device: str) -> tuple[list[Tensor], dict[str, object]]:
    tensors = drawn((2, 4, 70, 12), (2, 2, 133, 12), (20,), device=device)
    mask = torch.randn(2, 1, 70, 133, generator=torch.Generator().manual_seed(1))
    mask = mask.masked_fill(mask > 0.5, -math.inf).to(device)
    lengths = torch.tensor([50, 133], device=device)
    return tensors, {"mask": mask, "lengths": lengths, "causal": True, "dropout": 0.25}


def test_the_bits_of_a_sample_are_its_own(kernels):
    """For any batch, and wherever the key is."""
    tensors, options = everything(kernels.device)
    whole = results(tensors, **options, key=KEY.packed)
    options |= {"mask": options["mask"][1:], "lengths": options["lengths"][1:]}
    part = results([x[1:] for x in tensors], **options, key=KEY.samples(6).packed)
    assert_equal(part, [x[1:] for x in whole])


def test_a_key_on_the_device(kernels, monkeypatch):
    tensors, options = everything(kernels.device)
    here = results(tensors, **options, key=KEY.packed)
    rows = torch.tensor([[7, 3, 5], [7, 3, 6]], device=kernels.device)
    assert_equal(results(tensors, **options, key=rows), here)
    monkeypatch.setattr(EmulatedOps, "keys_on_device", True)
    assert_equal(results(tensors, **options, key=KEY.packed.to(kernels.device)), here)


def test_no_order_of_blocks_and_threads_matters(kernels):
    if not kernels.emulated:
        pytest.skip("a GPU has no order that could be chosen")
    tensors, options = everything(kernels.device)
    emulator, found = cuda.load()._module._emulator, []
    for seed in (0, 2):
        emulator.set_schedule(seed)
        found.append(results(tensors, **options, key=KEY.packed))
    emulator.set_schedule(0)
    assert_equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool], ids=str)
def test_a_mask_of_any_type_and_strides(dtype, kernels):
    tensors = drawn((1, 2, 5, 8), (1, 2, 9, 8), (8,), device=kernels.device)
    mask = torch.randn(1, 2, 5, 9, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    mask = mask > 0 if dtype == torch.bool else mask.masked_fill(mask > 0.5, -math.inf).to(dtype)
    exact = mask if dtype == torch.bool else mask.double()
    want = reference.attention(*(x.cpu().double() for x in tensors[:3]), SCALE, reference.Options(exact))
    mask = mask.to(kernels.device)
    found = results(tensors, mask)
    for one, expected in zip(found[:2], want, strict=True):
        torch.testing.assert_close(one.cpu().double(), expected, rtol=0, atol=3e-6)
    strided = mask.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    spread = torch.stack([mask, mask], -1)[..., 0]
    for same in (strided, spread):
        assert_equal(results(tensors, same), found)
    rows = mask[:, :1, :1]
    assert_equal(results(tensors, rows), results(tensors, rows.expand(1, 2, 5, 9).contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiles_that_nobody_sees_are_not_read(dtype, kernels):
    """A tile is of 64 tokens, of 32 in float64: what others hold of NaN and infinity goes nowhere."""
    side = 64 if dtype == torch.float32 else 32
    tensors = drawn((1, 1, 2 * side, 8), (1, 1, 3 * side, 8), (8,), dtype=dtype, device=kernels.device)
    masked = torch.ones(1, 1, 2 * side, 3 * side, dtype=torch.bool, device=kernels.device)
    masked[..., side : 2 * side] = False
    q, k, v, _ = tensors
    k[:, :, side : 2 * side], v[:, :, side : 2 * side] = math.nan, math.inf
    for mask in (masked, torch.zeros(masked.shape, dtype=dtype, device=kernels.device).masked_fill(~masked, -math.inf)):
        found = results(tensors, mask)
        assert all(bool(x.isfinite().all()) for x in found)
    # The first tile of queries sees one tile of keys, the second two, and nobody the third.
    k[:], v[:] = q[:, :, :1], 1.0
    k[:, :, 2 * side :], v[:, :, 2 * side :] = math.nan, math.nan
    found = results(tensors, causal=True)
    assert all(bool(x.isfinite().all()) for x in found)
    assert not bool(found[3][:, :, 2 * side :].any() or found[4][:, :, 2 * side :].any())
    v[:, :, side:] = math.nan
    assert bool(results(tensors, causal=True)[0][:, :, :side].isfinite().all())


def test_a_query_that_sees_nothing(kernels):
    tensors = drawn((2, 1, 5, 8), (2, 1, 9, 8), (8,), device=kernels.device)
    mask = torch.ones(1, 1, 5, 9, dtype=torch.bool, device=kernels.device)
    mask[:, :, 3] = False
    for options in ({"mask": mask}, {"mask": mask, "lengths": torch.tensor([0, 9], device=kernels.device)}):
        out, lse, grad_q, *_ = found = results(tensors, **options)
        hidden = torch.zeros(2, 1, 5, dtype=torch.bool, device=kernels.device)
        hidden[:, :, 3] = True
        hidden[0] |= "lengths" in options
        assert torch.equal(lse == -math.inf, hidden)
        assert not bool(out[hidden].any() or grad_q[hidden].any())
        assert all(bool(x.isfinite().all()) for x in (out, *found[2:]))


def test_heads_and_values_of_several_parts(kernels):
    """Of more channels than a block takes; the gradients of shared keys are the sums over the heads that share them."""
    for size, size_v in ((70, 9), (9, 140)):
        tensors = drawn((1, 4, 5, size), (1, 2, 7, size), (size_v,), dtype=torch.float64, device=kernels.device)
        q, k, v, grad_out = tensors
        shared = results(tensors, causal=True)
        alone = results([q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), grad_out], causal=True)
        assert_equal(shared[:3], alone[:3])
        for one, each in zip(shared[3:], alone[3:], strict=True):
            torch.testing.assert_close(one, each.unflatten(1, (2, 2)).sum(2), rtol=1e-13, atol=1e-13)


def test_what_makes_no_sense_is_refused(kernels):
    """By the launch, which writes nothing: what the module's callers never do."""
    module = cuda.load()._module
    x, out = torch.zeros(1, 2, 4, 8, device=kernels.device), torch.full((1, 2, 4, 8), 5.0, device=kernels.device)

    def heads(tensor: Tensor) -> tuple[int, ...]:
        return tensor.data_ptr(), *tensor.stride()

    rows = torch.zeros(1, 3, dtype=torch.int64)
    # mask, whether it is boolean, its dtype, key lengths, causal, dropout, key
    fine, sizes = (None, False, 0, None, True, 0.0, None), (1, 2, 4, 4, 8, 1, 8)
    for shape, options in (
        ((1, 2, 4, 4, 8, 3, 8), fine),
        ((1, 2, 4, 4, 8, 1, -8), fine),
        (sizes, (*fine[:5], math.nan, None)),
        (sizes, (*fine[:5], 1.5, None)),
        (sizes, (*fine[:5], 0.5, None)),
        (sizes, (*fine[:5], 0.5, (rows.data_ptr(), 1, False))),
    ):
        with pytest.raises(ValueError, match=r"_cuda\.attention of 1 x 2 heads of 8 float32 .*: invalid"):
            module.attention(
                q=heads(x), k=heads(x), v=heads(x), out=heads(out), lse=None, dtype=0, shape=shape, scale=1.0,
                options=options, base=None, place=cuda.load()._place(x),
            )  # fmt: skip
    assert bool((out == 5).all())
