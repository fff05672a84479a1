"""Normal noise into a given tensor, against torch.randn."""

from __future__ import annotations

import torch
from torch import Tensor

from gencore import Key, ops
from gencore.bench import cases, peers
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.suite.base import NOISE_TOLERANCES, Benchmark, Comparison, judged, noise_error, on_backends


def forward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    out = torch.empty(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    key = Key(0)

    def ours() -> Tensor:
        return ops.normal(case.shape, key, out=out)

    calls = {
        "ours": ours,
        **on_backends(ours, device),
        "eager": lambda: torch.randn(case.shape, dtype=dtype, device=device, out=out),
    }
    if device == "cuda":
        # On the CPU the compiler's own generator is slow enough to have nobody use it.
        calls["compile"] = peers.compiled(lambda: torch.randn(case.shape, dtype=dtype, device=device))
    return Comparison(
        calls,
        Work(nbytes=out.nbytes, values=case.elements),
        lambda result: noise_error(judged(result)),
        NOISE_TOLERANCES[dtype],
    )


BENCHMARKS = (Benchmark("normal", "forward into a given tensor", forward, cases.NOISE),)
