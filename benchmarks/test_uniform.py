"""Uniform noise into a given tensor, against torch.rand."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, ops
from gencore.bench import cases, limits


@pytest.mark.parametrize("case", cases.timed(cases.NOISE), ids=str)
def test_uniform(case, compare):
    out = torch.empty(case.shape).to(memory_format=case.memory_format)
    key = Key(0)
    compare(
        lambda: ops.uniform(case.shape, key, out=out),
        {"torch.rand(out=)": lambda: torch.rand(case.shape, out=out)},
        *limits.noise_floor("uniform", case.elements),
    )
