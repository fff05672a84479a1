"""Uniform noise into a given tensor, against torch.rand."""

from __future__ import annotations

from gencore.bench.suite import uniform

BENCHMARKS = uniform.BENCHMARKS


def test_uniform(task, compare):
    compare(task)
