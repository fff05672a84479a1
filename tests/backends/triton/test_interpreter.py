"""The interpreter that the other tests rely on rounds as a GPU does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import same_bits

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def fma_kernel(a, b, c, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.fma(tl.load(a + i), tl.load(b + i), tl.load(c + i)))


@triton.jit
def convert_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def any_bits(n: int) -> torch.Tensor:
    return (
        torch.randint(-(1 << 31), 1 << 31, (n,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    )


def test_fma_rounds_once(device):
    a, b = (torch.randn(4096, generator=torch.Generator().manual_seed(i)) for i in range(2))
    # The sum cancels all but what the first of two roundings would lose.
    c = -(a * b)
    a[0], b[1], c[2] = float("nan"), float("inf"), float("-inf")
    out = torch.empty(4096, device=device)
    fma_kernel[(1,)](a.to(device), b.to(device), c.to(device), out, SIZE=4096)
    exact = (a.double() * b.double() + c.double()).float()
    assert out[3:].count_nonzero() > 2000
    torch.testing.assert_close(out.cpu(), exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_to_and_from_halves(half, device):
    ties = torch.from_numpy(np.arange(0x3F800000, 0x3F900000, 0x1000, dtype=np.int32)).view(torch.float32)
    x = torch.cat((any_bits((1 << 14) - len(ties)), ties)).to(device)
    rounded, back = torch.empty_like(x, dtype=half), torch.empty_like(x)
    convert_kernel[(1,)](x, rounded, SIZE=1 << 14)
    convert_kernel[(1,)](x.to(half), back, SIZE=1 << 14)
    number = ~x.isnan()
    assert same_bits(rounded[number], x[number].to(half))
    assert bool(rounded[~number].isnan().all())
    assert same_bits(back[number], x[number].to(half).float())
