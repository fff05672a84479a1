"""A sampler's step, against PyTorch eager and compiled, and diffusers."""

from __future__ import annotations

from gencore.bench.suite import diffusion_step

BENCHMARKS = diffusion_step.BENCHMARKS


def test_diffusion_step(task, compare):
    compare(task)
