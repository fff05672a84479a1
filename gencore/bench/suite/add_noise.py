"""Noising a batch, each sample to its own step, against PyTorch eager and compiled, and diffusers where it is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gencore import Key, diffusion, ops
from gencore.bench import cases, peers
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.suite.base import NOISE_TOLERANCES, Benchmark, Comparison, bound, judged, noise_error, on_backends

SCHEDULE = diffusion.linear()
# Two products and a sum for each value.
FLOPS = 3


def noised(x0: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    shape = (-1, *[1] * (x0.dim() - 1))
    return alpha[t].view(shape) * x0 + sigma[t].view(shape) * torch.randn_like(x0)


def _noised_into(out: Tensor, x0: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Without a new tensor, as one who counts them writes it."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return out.normal_().mul_(sigma[t].view(shape)).addcmul_(alpha[t].view(shape), x0)


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Data and the steps of its samples.

    None is of the first quarter: there is little noise in it, of which a half type keeps too little to be judged by.
    """
    x0 = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    return x0, torch.randint(len(SCHEDULE) // 4, len(SCHEDULE), case.shape[:1], device=device)


def implied_noise(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    known, found = judged(x0), judged(x_t)
    shape = (-1, *[1] * (known.dim() - 1))
    alpha, sigma = (level.to(t.device)[t[: len(known)]].view(shape) for level in (SCHEDULE.alpha, SCHEDULE.sigma))
    return (found - alpha * known) / sigma


def _peers(x0: Tensor, t: Tensor, device: str) -> dict[str, Callable[[], Any]]:
    alpha, sigma = (level.to(device, x0.dtype) for level in (SCHEDULE.alpha, SCHEDULE.sigma))
    found: dict[str, Callable[[], Any]] = bound(peers.eager_and_compiled(noised, device), x0, t, alpha, sigma)
    scheduler = peers.diffusers_scheduler("DDPMScheduler", device)
    if scheduler is not None:
        found["diffusers"] = lambda: scheduler.add_noise(x0, torch.randn_like(x0), t)
    return found


def _comparison(case: Case, dtype: torch.dtype, device: str, into: bool) -> Comparison:
    x0, t = inputs(case, dtype, device)
    key, out = Key(0), torch.empty_like(x0) if into else None

    def ours() -> Tensor:
        return ops.add_noise(x0, t, SCHEDULE, key, out=out)

    calls = {"ours": ours, **on_backends(ours, device)} | _peers(x0, t, device)
    if out is not None:
        alpha, sigma = (level.to(device, x0.dtype) for level in (SCHEDULE.alpha, SCHEDULE.sigma))
        calls["eager, in place"] = lambda: _noised_into(out, x0, t, alpha, sigma)
    return Comparison(
        calls,
        Work(nbytes=2 * x0.nbytes, values=case.elements, flops=FLOPS * case.elements),
        lambda x_t: noise_error(implied_noise(x_t, x0, t)),
        NOISE_TOLERANCES[dtype],
    )


def forward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _comparison(case, dtype, device, into=False)


def forward_into(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """Into a tensor that is there."""
    return _comparison(case, dtype, device, into=True)


BENCHMARKS = (
    Benchmark("add_noise", "forward", forward, cases.DIFFUSION),
    Benchmark(
        "add_noise",
        "forward into a given tensor",
        forward_into,
        cases.DIFFUSION,
        {"cpu": (torch.float32,), "cuda": (torch.float32,)},
    ),
)
