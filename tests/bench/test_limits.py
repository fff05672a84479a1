"""The floors: bounds of the right size, measured."""

from __future__ import annotations

import pytest
import torch

from gencore.backends import cpu
from gencore.bench import limits


def test_the_rates_of_one_core_are_measured(simd_level):
    for rate in (cpu.multiplications_per_second(), cpu.vector_instructions_per_second()):
        assert 0 < rate < float("inf")


def test_the_memory_floor_is_bytes_over_the_bandwidth_of_their_size(monkeypatch):
    asked = []

    def bandwidth(nbytes, threads, device):
        asked.append(nbytes)
        return 1e9

    monkeypatch.setattr(limits, "copy_bandwidth", bandwidth)
    assert limits.memory_floor(3_000_000) == pytest.approx(0.003)
    assert limits.memory_floor(1000) == pytest.approx(1e-6)
    assert limits.memory_floor(1 << 40) == pytest.approx((1 << 40) / 1e9)
    assert asked == [1 << 22, 1 << 20, 256 << 20]


def test_the_noise_floor_is_the_higher_limit_over_the_threads_in_use(monkeypatch):
    monkeypatch.setattr(limits, "_core", lambda level: (5e9, 1e6))
    monkeypatch.setattr(cpu, "simd_level", lambda: "avx512")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    seconds, limit = limits.noise_floor("normal", 6400)
    assert (seconds, limit) == (pytest.approx(6400 * 250 / 64 / 1e6), "instruction issue")
    assert limits.noise_floor("normal", 64_000)[0] == pytest.approx(64_000 * 250 / 64 / 1e6 / 3)
    monkeypatch.setattr(limits, "_core", lambda level: (5e3, 1e9))
    assert limits.noise_floor("uniform", 1000) == (pytest.approx(1.0), "integer multiplications")


def test_the_floor_of_products_is_operations_over_the_best_rate(monkeypatch):
    monkeypatch.setattr(cpu, "multiply_adds_per_second", lambda of_bfloat16: 1e15 if of_bfloat16 else 1e3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    limits._products_per_second.cache_clear()
    assert limits.matmul_floor(6_000_000, torch.bfloat16) == pytest.approx(1e-9)
    # The library is faster than a thousand a second, and half types no slower than what they are converted to.
    assert 0 < limits.matmul_floor(1000, torch.float32) < 1e-5
    assert limits.matmul_floor(1000, torch.float16) < 1e-5
    limits._products_per_second.cache_clear()
