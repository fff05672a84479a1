"""Uniform noise into a given tensor, against torch.rand."""

from __future__ import annotations

import torch
from torch import Tensor

from gencore import Key, ops
from gencore.bench import cases, peers
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.suite.base import NOISE_TOLERANCES, Benchmark, Comparison, judged, noise_error, on_backends

_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32,)}


def forward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    out = torch.empty(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    key = Key(0)

    def ours() -> Tensor:
        return ops.uniform(case.shape, key, out=out)

    calls = {
        "ours": ours,
        **on_backends(ours, device),
        "eager": lambda: torch.rand(case.shape, dtype=dtype, device=device, out=out),
    }
    if device == "cuda":
        calls["compile"] = peers.compiled(lambda: torch.rand(case.shape, dtype=dtype, device=device))
    return Comparison(
        calls,
        Work(nbytes=out.nbytes, values=case.elements, noise="uniform"),
        # Moved to mean 0 and deviation 1. That of a uniform sample varies less than that of a normal one.
        lambda result: noise_error((judged(result) - 0.5) * 12**0.5),
        NOISE_TOLERANCES[dtype],
    )


BENCHMARKS = (Benchmark("uniform", "forward into a given tensor", forward, cases.NOISE, _DTYPES),)
