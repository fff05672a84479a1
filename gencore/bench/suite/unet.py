"""Whole networks of our kernels, against diffusers as its users run it: eager, channels_last, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gencore.bench import cases
from gencore.bench.cases import NetworkCase
from gencore.bench.limits import Work
from gencore.bench.suite import networks
from gencore.bench.suite.base import Benchmark, Comparison, largest_error
from gencore.bench.suite.networks import Candidate

_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def forward(case: NetworkCase, dtype: torch.dtype, device: str) -> Comparison:
    built = networks.pair(case, device)
    found = networks.candidates(built, dtype)

    def without_gradient(candidate: Candidate) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return candidate()

        return call

    mine = found["ours"]
    moved = networks.weights_nbytes(mine) + 2 * mine.inputs[0].nbytes
    count = networks.products(built)
    return Comparison(
        {name: without_gradient(candidate) for name, candidate in found.items()},
        Work(nbytes=moved, products=count, flops=count),
        # Images know nothing of each other.
        largest_error(without_gradient(networks.definition(built, dtype)), of=lambda result: result[:1]),
        networks.tolerance(dtype, device),
    )


def forward_and_backward(case: NetworkCase, dtype: torch.dtype, device: str) -> Comparison:
    """The mean square, and its gradient for the image and every parameter."""
    built = networks.pair(case, device)
    found = networks.candidates(built, dtype)

    def both_ways(candidate: Candidate, images: int = 1) -> Callable[[], Any]:
        x, *rest = candidate.inputs
        leaf = x.detach().requires_grad_()
        wanted = [leaf, *candidate.model.parameters()]

        def call() -> Any:
            loss = candidate.called(leaf, *rest).square().mean() / images
            return torch.autograd.grad(loss, wanted)

        return call

    mine = found["ours"]
    moved = 3 * networks.weights_nbytes(mine) + 3 * mine.inputs[0].nbytes
    count = networks.products(built, backward=True)
    expected = both_ways(networks.definition(built, dtype), case.batch)
    return Comparison(
        {name: both_ways(candidate) for name, candidate in found.items()},
        # The weights are read twice, and their gradients written.
        Work(nbytes=moved, products=count, flops=count),
        # The gradient for the first image is that of the first image alone; those for the weights are of all.
        largest_error(lambda: expected()[0], of=lambda result: result[0][:1]),
        networks.tolerance(dtype, device),
    )


BENCHMARKS = (
    Benchmark("unet", "forward", forward, cases.NETWORKS, _DTYPES, section="networks"),
    Benchmark(
        "unet",
        "forward and backward",
        forward_and_backward,
        cases.NETWORKS,
        _DTYPES,
        fits=lambda case: case.name == "ddpm-cifar10",
        section="networks",
    ),
)
