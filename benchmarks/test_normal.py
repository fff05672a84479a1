"""Normal noise into a given tensor, against torch.randn."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, ops
from gencore.bench import cases, limits
from gencore.bench.peers import compiled

CASES = cases.NOISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normal(case, dtype, device, compare, our_triton):
    out = torch.empty(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    key = Key(0)
    compare(
        lambda: ops.normal(case.shape, key, out=out),
        {"torch.randn(out=)": lambda: torch.randn(case.shape, dtype=dtype, device=device, out=out)}
        | (
            {"compile": compiled(lambda: torch.randn(case.shape, dtype=dtype, device=device))}
            if device == "cuda"
            else {}
        )
        | our_triton("normal_", out, key.packed),
        *limits.floor(out.nbytes, case.elements, device),
        nbytes=out.nbytes,
    )


def test_normal_one_thread(compare, our_triton, request):
    if request.config.getoption("device") != "cpu":
        pytest.skip("threads are the CPU's")
    case = cases.Case((4, 1 << 20), "4 M values")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        test_normal(case, torch.float32, "cpu", compare, our_triton)
    finally:
        torch.set_num_threads(threads)
