"""Normal noise into a given tensor, against torch.randn."""

from __future__ import annotations

from gencore.bench.suite import normal

BENCHMARKS = normal.BENCHMARKS


def test_normal(task, compare):
    compare(task)
