"""The training loss, forward and backward, against PyTorch eager and compiled."""

from __future__ import annotations

from gencore.bench.suite import denoising_loss

BENCHMARKS = denoising_loss.BENCHMARKS


def test_denoising_loss(task, compare):
    compare(task)
