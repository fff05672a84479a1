"""Fixtures of the tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gencore.backends import cpu


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once at each SIMD level that this machine has."""
    level = request.param
    if level not in cpu.build_info()["simd_supported"]:
        pytest.skip(f"this processor has no {level}")
    before = cpu.simd_level()
    cpu.set_simd_level(level)
    yield level
    cpu.set_simd_level(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test once with each number of threads, more than this machine has cores among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
