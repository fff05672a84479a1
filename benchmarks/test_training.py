"""Steps of training and sampling, against the same models on PyTorch's operations, and diffusers."""

from __future__ import annotations

from gencore.bench.suite import training

BENCHMARKS = training.BENCHMARKS


def test_training(task, compare):
    compare(task)
