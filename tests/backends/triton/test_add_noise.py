"""The forward process by Triton's kernel: the bits of the CPU kernel. tests/ops holds both to the definition."""

from __future__ import annotations

import pytest
import torch
from support import same_bits

from gencore import Key
from gencore.backends import cpu
from gencore.bench import cases

pytest.importorskip("triton")

from backends.triton.diffusion import DEVICE, EVERY_LARGE, KEY, drawn, on_device, rows_in_memory

from gencore.backends import triton as kernels

# No number that float32 holds.
TABLE = torch.linspace(0.1, 0.9, 14, dtype=torch.float64).reshape(7, 2)


def assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
        assert same_bits(a, b)


@pytest.mark.parametrize(("dtype", "case"), EVERY_LARGE, ids=str)
def test_bits_of_the_cpu_kernel_at_large(dtype, case):
    t = torch.arange(case.shape[0]) % len(TABLE)
    args = (drawn(case, dtype, 0), TABLE, t, KEY.packed, True)
    assert_same(kernels.add_noise(*on_device(*args)), cpu.ops.add_noise(*args))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (40, 6)])
def test_bits_wherever_coefficients_are(shape, dtype):
    x0, key = drawn(cases.Case(shape, ""), dtype, 0), Key(torch.arange(shape[0])).packed
    for row in (TABLE[2:3], TABLE[4:5].repeat(shape[0], 1)):
        want = cpu.ops.add_noise(x0, row, None, key, True)
        assert_same(kernels.add_noise(x0.to(DEVICE), row, None, key, True), want)
        with rows_in_memory("add_noise"):
            assert_same(kernels.add_noise(*on_device(x0, row, None, key, True)), want)


@pytest.mark.parametrize("shape", [(3, 1200), (5, 6)])
def test_a_step_out_of_range(shape):
    x0 = drawn(cases.Case(shape, ""), torch.float32, 0)
    t = torch.tensor([0, -1, 6, 7, 2**40])[: shape[0]]
    inside = (t >= 0) & (t < 7)
    want, eps = cpu.ops.add_noise(x0, TABLE, t.where(inside, 0), KEY.packed, True)
    got, noise = kernels.add_noise(*on_device(x0, TABLE, t, KEY.packed, True))
    assert same_bits(got[inside.to(DEVICE)], want[inside])
    assert got[~inside.to(DEVICE)].isnan().all()
    assert same_bits(noise, eps)
