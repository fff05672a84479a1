"""Reparameterized sampling, forward and backward, against PyTorch eager and compiled; and what a call costs."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, ops
from gencore.backends import choice
from gencore.bench.limits import Work
from gencore.bench.measure import interleave
from gencore.bench.suite import reparameterize
from gencore.bench.suite.base import Comparison

BENCHMARKS = reparameterize.BENCHMARKS


def test_reparameterize(task, compare):
    compare(task)


def test_call_overhead(device, compare, request):
    """Four elements: what the call costs over the compiled kernel, which is called with its addresses ready."""
    if device != request.config.getoption("device"):
        pytest.skip("the emulator wants to be told of every address before a call")
    mu, logvar = (torch.randn(1, 4, device=device) for _ in range(2))
    key, z = Key(0), torch.empty(1, 4, device=device)
    backend = choice.load(choice.choose(mu.device))
    # Key and tensors outlive the calls, so their addresses and the place can be asked for once.
    arguments = (
        mu.data_ptr(), logvar.data_ptr(), z.data_ptr(), 0, 0, 0, 1, 1, 4, 0, key.packed.data_ptr(), 0,
        *backend._place_of_key(key.packed), *backend._place(mu),
    )  # fmt: skip

    def kernel() -> None:
        backend._module.reparameterize(*arguments)

    calls = {
        "ours": lambda: ops.reparameterize(mu, logvar, key),
        "kernel alone": kernel,
        "mu + 1": lambda: mu + 1,
        "eager": lambda: reparameterize.sample(mu, logvar),
    }
    # What the host takes: nobody waits for the GPU.
    compare.run(
        Comparison(calls, Work(), clock="cpu"),
        (interleave({"kernel": kernel})["kernel"].median, "the kernel alone"),
    )
