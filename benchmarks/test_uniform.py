"""Uniform noise into a given tensor, against torch.rand."""

from __future__ import annotations

import torch

from gencore import Key, ops
from gencore.bench import cases, limits

CASES = cases.NOISE


def test_uniform(case, device, compare):
    out = torch.empty(case.shape, device=device).to(memory_format=case.memory_format)
    key = Key(0)
    compare(
        lambda: ops.uniform(case.shape, key, out=out),
        {"torch.rand(out=)": lambda: torch.rand(case.shape, out=out, device=device)},
        *limits.floor(out.nbytes, case.elements, device, "uniform"),
        nbytes=out.nbytes,
    )
