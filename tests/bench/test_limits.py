"""The floors: bounds of the right size, measured."""

from __future__ import annotations

import pytest

from gencore.backends import cpu
from gencore.bench import limits


def test_one_core_does_between_a_tenth_and_a_hundred_billion_operations_per_second(simd_level):
    for rate in (cpu.multiplications_per_second(), cpu.vector_instructions_per_second()):
        assert 1e8 < rate < 1e12


def test_floors_grow_with_the_work():
    assert limits.memory_floor(1 << 24) == pytest.approx(2 * limits.memory_floor(1 << 23), rel=0.9)
    (small, limit), (large, _) = limits.noise_floor("normal", 1000), limits.noise_floor("normal", 4000)
    assert large == pytest.approx(4 * small)
    assert limit in ("integer multiplications", "instruction issue")
