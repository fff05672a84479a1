"""Uniform noise. Whatever it shares with normal noise is tested there."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from support import same_bits

from gencore import Key, ops
from gencore.backends.reference.uniform import uniform as reference
from gencore.bench import cases


@pytest.mark.parametrize("case", cases.small(cases.NOISE), ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bits_of_the_reference(case, dtype, kernels):
    for key in (Key(-3).stream(7).samples(2**40), Key(torch.arange(case.shape[0]))):
        drawn = ops.uniform(case.shape, key, dtype=dtype, device=kernels.device, memory_format=case.memory_format)
        assert drawn.is_contiguous(memory_format=case.memory_format)
        assert same_bits(drawn, reference(case.shape, key, dtype=dtype))


def test_range_and_resolution():
    x = ops.uniform((1, 1 << 22), Key(1)).double()
    assert 0 <= x.min() < 2.0**-18
    assert 1 - 2.0**-18 < x.max() < 1
    assert torch.equal(x * 2**24, (x * 2**24).round())


def test_distribution():
    x = ops.uniform((1, 1 << 20), Key(2026)).double().numpy().ravel()
    assert stats.kstest(x, "uniform").pvalue > 1e-6
    assert stats.chisquare(torch.histc(torch.from_numpy(x), 256, 0, 1).numpy()).pvalue > 1e-6


def test_says_what_is_wrong():
    with pytest.raises(TypeError, match="dtype must be one of float32, bfloat16, float16, float64, got int64"):
        ops.uniform((2, 3), Key(0), dtype=torch.int64)


def test_opcheck():
    torch.library.opcheck(torch.ops.gencore.uniform_.default, (torch.empty(4, 10), Key(1).packed))
