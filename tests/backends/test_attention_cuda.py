"""Attention's CUDA kernels in the emulator, where blocks have less shared memory or the grid is another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_bounds import Bound, Terms, assert_close, exact, inputs
from kernels import running
from support import same_bits
from torch import Tensor

from gencore.backends import choice, cuda
from gencore.bench.cases import AttentionCase


@pytest.fixture
def emulator() -> Iterator[object]:
    with running("cuda") as kernels:
        if not kernels.emulated:
            pytest.skip("a GPU has the shared memory that it has")
        found = cuda.load()._module._emulator
        yield found
        found.set_shared_memory(227 << 10)
        found.set_multiprocessors(4)


def results(tensors: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    """The output, its log-sum-exp and the gradients."""
    out, lse = choice.kernel("attention", tensors[0])(*tensors, 0.1)
    assert lse is not None
    return [out, lse, *choice.kernel("attention_backward", out)(grad_out, *tensors, out, lse, 0.1, [True] * 3)]


# Of compute capability 8.0; of 8.6, 8.9 and 12.0; less than any has, so that kernels have none of the large tiles.
@pytest.mark.parametrize("size_kib", [163, 99, 24])
@pytest.mark.parametrize("layout", ["tokens", "contiguous"])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_with_less_shared_memory(size, layout, size_kib, emulator):
    # The last of them without tensor cores: a few tokens, for that is slow here.
    tokens = (18, 20) if size == 512 or size_kib < 99 else (40, 70)
    tensors = inputs(AttentionCase(1, 1, *tokens, size, "", layout="tokens"), torch.bfloat16)
    if layout == "contiguous":
        tensors = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in tensors]
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    emulator.set_shared_memory(size_kib << 10)
    out, lse, *grads = results(tensors, grad_out)
    terms = Terms(*exact(tensors), torch.bfloat16, 0.1)
    assert_close(out, terms.out, "out")
    assert_close(lse, terms.lse, "lse")
    bounds: tuple[Bound, ...] = terms.gradients(grad_out.double())
    for got, bound, name in zip(grads, bounds, "qkv", strict=True):
        assert_close(got, bound, f"gradient of {name}")


@pytest.mark.parametrize("size", [40, 160, 512])
def test_bits_for_any_number_of_multiprocessors(size, emulator):
    """Blocks have fewer warps where there are few of them, and more tiles in shared memory where they fit."""
    tensors = inputs(AttentionCase(1, 2, 70, 50, size, "", layout="tokens"), torch.bfloat16)
    grad_out = torch.ones_like(tensors[0])
    want = results(tensors, grad_out)
    for multiprocessors, size_kib in ((1, 227), (132, 227), (1, 163)):
        emulator.set_multiprocessors(multiprocessors)
        emulator.set_shared_memory(size_kib << 10)
        for got, expected in zip(results(tensors, grad_out), want, strict=True):
            assert same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_for_any_layout(dtype, emulator):
    """Tokens or channels side by side, or neither."""
    tensors = inputs(AttentionCase(2, 2, 37, 50, 40, ""), dtype)
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = results(tensors, grad_out)
    for order in ((0, 1, 3, 2), (0, 2, 1, 3), (2, 3, 0, 1), (3, 2, 1, 0)):
        back = [order.index(i) for i in range(4)]
        grad, *others = (x.permute(order).contiguous().permute(back) for x in (grad_out, *tensors))
        for got, expected in zip(results(others, grad), want, strict=True):
            assert same_bits(got, expected)
        assert got.stride() == others[2].stride()


def test_what_is_not_there_is_refused(emulator):
    """By the launch, which writes nothing: what the module's callers never do."""
    module = cuda.load()._module
    x = torch.zeros(1, 1, 4, 8)
    out = torch.full_like(x, 5.0)

    def heads(tensor: Tensor, *strides: int) -> tuple[int, ...]:
        return tensor.data_ptr(), *(strides or tensor.stride())

    right = dict.fromkeys(("q", "k", "v"), heads(x)) | {"out": heads(out), "lse": None, "dtype": 0, "base": None}
    right |= {"shape": (1, 1, 4, 4, 8, 0, 0), "scale": 0.5, "options": None, "place": (0, None, None)}
    scattered, nothing = heads(x, 32, 32, 2, 2), (None, 32, 32, 8, 1)
    for wrong in ({"q": scattered}, {"q": nothing}, {"shape": (1, 1, 4, 4, 0, 0, 0)}, {"dtype": 9}):
        with pytest.raises(ValueError, match=r"_cuda\.attention of 1 x 1 heads of \d \w+"):
            module.attention(**right | wrong)
    grads = dict.fromkeys(("grad_q", "grad_k", "grad_v"), heads(out)) | {"grad_out": heads(x), "grad_mask": None}
    with pytest.raises(ValueError, match=r"_cuda\.attention_backward of 1 x 1 heads of 8 float32 channels, 4 queries"):
        module.attention_backward(**right | grads | {"out": heads(x), "lse": x.data_ptr()})
    assert bool((out == 5).all())
