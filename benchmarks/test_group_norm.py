"""Group norm with SiLU, forward and backward, against PyTorch eager and compiled, and Liger-Kernel."""

from __future__ import annotations

from gencore.bench.suite import group_norm

BENCHMARKS = group_norm.BENCHMARKS


def test_group_norm(task, compare):
    compare(task)
