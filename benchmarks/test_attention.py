"""Attention, of heads, of images and in its block, against PyTorch's own and the packages for it."""

from __future__ import annotations

from gencore.bench.suite import attention

BENCHMARKS = attention.BENCHMARKS


def test_attention(task, compare):
    compare(task)
