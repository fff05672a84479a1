"""Whole networks of our kernels, against diffusers as its users run it: eager, channels_last, compiled."""

from __future__ import annotations

from gencore.bench.suite import unet

BENCHMARKS = unet.BENCHMARKS


def test_unet(task, compare):
    compare(task)
