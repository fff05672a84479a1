"""Noising a batch, each sample to its own step, against PyTorch eager and compiled, and diffusers."""

from __future__ import annotations

from gencore.bench.suite import add_noise

BENCHMARKS = add_noise.BENCHMARKS


def test_add_noise(task, compare):
    compare(task)
