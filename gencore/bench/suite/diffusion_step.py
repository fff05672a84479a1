"""A sampler's step, against PyTorch eager and compiled, and diffusers where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gencore import Key, diffusion, ops
from gencore.bench import cases, peers
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.suite.base import (
    NOISE_TOLERANCES,
    TOLERANCES,
    Benchmark,
    Comparison,
    bound,
    double,
    judged,
    largest_error,
    noise_error,
    on_backends,
)

SCHEDULE = diffusion.linear()
STEPS, T = 50, 500
_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32,)}


def ddpm_mean(x: Tensor, output: Tensor, predict_x: float, predict_output: float, of_x: float, of_x0: float) -> Tensor:
    x0 = (predict_x * x + predict_output * output).clamp(-1, 1)
    return of_x * x + of_x0 * x0


def ddpm(x: Tensor, output: Tensor, *values: float) -> Tensor:
    *of_mean, noise = values
    return ddpm_mean(x, output, *of_mean) + noise * torch.randn_like(x)


def ddim(x: Tensor, output: Tensor, predict_x: float, predict_output: float, of_x0: float, direct: float) -> Tensor:
    x0 = (predict_x * x + predict_output * output).clamp(-1, 1)
    return of_x0 * x0 + direct * output


def _into(out: Tensor, x: Tensor, output: Tensor, sampler: Sampler, values: list[float]) -> Tensor:
    """Without a new tensor but one, the noise or what is added last, as one who counts them writes it."""
    predict_x, predict_output, *rest = values
    torch.mul(x, predict_x, out=out).add_(output, alpha=predict_output).clamp_(-1, 1)
    if sampler is DDIM:
        of_x0, direct = rest
        return out.mul_(of_x0).add_(output, alpha=direct)
    of_x, of_x0, noise = rest
    return out.mul_(of_x0).add_(x, alpha=of_x).add_(torch.randn_like(x), alpha=noise)


class Sampler(NamedTuple):
    """What a sampler's step is, and what peers need of its coefficients.

    Attributes:
        make: ours.
        function: a step in PyTorch.
        columns: of the coefficients, those that the function takes.
        flops: operations per value: the prediction 3, its clipping 2, then 3 for two terms and 5 for three.
        theirs: diffusers' class.
    """

    make: Callable[..., diffusion.Sampler]
    function: Callable[..., Tensor]
    columns: tuple[str, ...]
    flops: int
    theirs: str

    def made(self) -> diffusion.Sampler:
        return self.make(SCHEDULE, STEPS, clip=1.0, spacing="leading")

    def values(self, row: Tensor) -> list[float]:
        return [row[ops.STEP_COLUMNS.index(name)].item() for name in self.columns]


_PREDICTION = ("predict_x", "predict_output")
DDPM = Sampler(diffusion.ddpm, ddpm, (*_PREDICTION, "x", "x0", "noise"), 10, "DDPMScheduler")
DDIM = Sampler(diffusion.ddim, ddim, (*_PREDICTION, "x0", "direct"), 8, "DDIMScheduler")


def _inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    x, output = (
        torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format) for _ in range(2)
    )
    return x, output


def _step(sampler: Sampler, case: Case, dtype: torch.dtype, device: str, into: bool = False) -> Comparison:
    made = sampler.made()
    row = made.rows[made.times.tolist().index(T)]
    values = sampler.values(row)
    x, output = _inputs(case, dtype, device)
    key, out = Key(0), torch.empty_like(x) if into else None

    def ours() -> Tensor:
        return ops.diffusion_step(x, output, row, key, out=out)

    calls: dict[str, Callable[[], Any]] = {"ours": ours, **on_backends(ours, device)}
    calls |= bound(peers.eager_and_compiled(sampler.function, device), x, output, *values)
    scheduler = peers.diffusers_scheduler(sampler.theirs, device, STEPS)
    if scheduler is not None:
        calls["diffusers"] = lambda: scheduler.step(output, T, x).prev_sample
    draws = sampler is DDPM
    if out is not None:
        calls["eager, in place"] = lambda: _into(out, x, output, sampler, values)

    def of_noise(result: Tensor) -> float:
        *of_mean, noise = values
        return noise_error((judged(result) - ddpm_mean(judged(x), judged(output), *of_mean)) / noise)

    return Comparison(
        calls,
        Work(nbytes=3 * x.nbytes, values=case.elements if draws else 0, flops=sampler.flops * case.elements),
        of_noise if draws else largest_error(lambda: sampler.function(*double(x, output), *values)),
        (NOISE_TOLERANCES if draws else TOLERANCES)[dtype],
    )


def ddpm_step(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _step(DDPM, case, dtype, device)


def ddim_step(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _step(DDIM, case, dtype, device)


def ddpm_step_into(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """Into a tensor that is there, as a sampling loop does."""
    return _step(DDPM, case, dtype, device, into=True)


def ddim_step_into(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _step(DDIM, case, dtype, device, into=True)


def loop(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """DDIM's 50 steps with a network that takes no time, as it says x: what a sampling loop costs beside it."""
    made, key = DDIM.made(), Key(0)
    rows, times = [DDIM.values(row) for row in made.rows], made.times.tolist()
    formatted: dict[str, Any] = {"device": device, "dtype": dtype, "memory_format": case.memory_format}
    # What ours begins with, and draws itself.
    start = made.initial_scale * ops.normal(case.shape, key.stream(0), **formatted)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x

    def ours() -> Tensor:
        return diffusion.sample(network, case.shape, made, key, **formatted)

    def looped(x: Tensor) -> Tensor:
        for values, time in zip(rows, times, strict=True):
            t = torch.full(case.shape[:1], time, dtype=torch.float32, device=device)
            x = ddim(x, network(x, t), *values)
        return x

    calls: dict[str, Callable[[], Any]] = {"ours": ours, "eager": lambda: looped(start)}
    scheduler = peers.diffusers_scheduler(DDIM.theirs, device, STEPS)
    if scheduler is not None:

        def theirs() -> Tensor:
            x = start
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t), t, x).prev_sample
            return x

        calls["diffusers"] = theirs
    return Comparison(
        calls,
        Work(nbytes=2 * STEPS * start.nbytes, values=case.elements, flops=STEPS * DDIM.flops * case.elements),
        largest_error(lambda: looped(start.double())),
        # Every step rounds.
        4 * TOLERANCES[dtype],
    )


BENCHMARKS = (
    Benchmark("diffusion_step", "DDPM step", ddpm_step, cases.DIFFUSION),
    Benchmark("diffusion_step", "DDIM step", ddim_step, cases.DIFFUSION),
    Benchmark("diffusion_step", "DDPM step into a given tensor", ddpm_step_into, cases.DIFFUSION, _DTYPES),
    Benchmark("diffusion_step", "DDIM step into a given tensor", ddim_step_into, cases.DIFFUSION, _DTYPES),
    Benchmark(
        "diffusion_step",
        "50 DDIM steps without a network",
        loop,
        cases.DIFFUSION,
        _DTYPES,
        # What a call takes shows in small ones.
        wanted=lambda case, dtype: case.elements <= 1 << 16,
    ),
)
