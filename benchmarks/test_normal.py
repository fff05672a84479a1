"""Normal noise into a given tensor, against torch.randn."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, ops
from gencore.bench import cases, limits


@pytest.mark.parametrize("case", cases.timed(cases.NOISE), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normal(case, dtype, compare):
    out = torch.empty(case.shape, dtype=dtype).to(memory_format=case.memory_format)
    key = Key(0)
    compare(
        lambda: ops.normal(case.shape, key, out=out),
        {"torch.randn(out=)": lambda: torch.randn(case.shape, dtype=dtype, out=out)},
        *limits.noise_floor("normal", case.elements),
    )


def test_normal_one_thread(compare):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        test_normal(cases.NOISE[-1], torch.float32, compare)
    finally:
        torch.set_num_threads(threads)
