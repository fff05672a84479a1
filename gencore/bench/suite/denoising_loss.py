"""The training loss, forward and backward, against PyTorch eager and compiled.

All are given the noise, that of one key. Where the noising is timed too, PyTorch's functions draw their own, and ours
hand theirs on from the noising to the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore import Key, ops
from gencore.bench import cases, peers
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.suite import add_noise
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

_FLOAT32 = {"cpu": (torch.float32,), "cuda": (torch.float32,)}
# Operations per value: a difference, its square, their sum. Backward: a difference and a product.
_FORWARD, _BACKWARD = 3, 2


def loss(output: Tensor, eps: Tensor) -> Tensor:
    """Of each sample, in float32 for half types as networks' losses are."""
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    return F.mse_loss(output.to(wide), eps.to(wide), reduction="none").flatten(1).mean(1)


def noise_and_loss(output: Tensor, x0: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    eps, shape = torch.randn_like(x0), (-1, *[1] * (x0.dim() - 1))
    return alpha[t].view(shape) * x0 + sigma[t].view(shape) * eps, loss(output, eps)


def _inputs(case: Case, dtype: torch.dtype, device: str, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    return output.requires_grad_(grad), *add_noise.inputs(case, dtype, device)


def _noise(x0: Tensor, key: Key, dtype: torch.dtype, case: Case) -> Tensor:
    """What :func:`gencore.ops.add_noise` gives back of the key."""
    return ops.normal(x0.shape, key, dtype=dtype, device=x0.device, memory_format=case.memory_format)


def _peers(device: str) -> dict[str, Callable[..., Tensor]]:
    # Nothing is drawn.
    return {"eager": loss, "compile": peers.compiled(loss)}


def forward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    output, x0, t = _inputs(case, dtype, device, grad=False)
    key = Key(0)
    eps = _noise(x0, key, dtype, case)

    def ours() -> Tensor:
        return ops.denoising_loss(output, x0, t, add_noise.SCHEDULE, noise=eps)

    return Comparison(
        {"ours": ours, **on_backends(ours, device)} | bound(_peers(device), output, eps),
        # Read the output and the noise; a network that predicts the noise has no x0 in its target.
        Work(nbytes=2 * output.nbytes, flops=_FORWARD * case.elements),
        largest_error(lambda: loss(output.double(), _noise(x0, key, torch.float64, case))),
        TOLERANCES[dtype],
    )


def forward_and_backward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    output, x0, t = _inputs(case, dtype, device, grad=True)
    key = Key(0)
    eps = _noise(x0, key, dtype, case)
    g = torch.ones(case.shape[0], device=device)

    def through(function: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            value = function(output, eps)
            return torch.autograd.grad(value, output, g.to(value.dtype))

        return run

    def expected() -> Any:
        (wide,) = double(output)
        return torch.autograd.grad(loss(wide, _noise(x0, key, torch.float64, case)), wide, g.double())

    ours = through(lambda output, eps: ops.denoising_loss(output, x0, t, add_noise.SCHEDULE, noise=eps))
    return Comparison(
        {"ours": ours, **on_backends(ours, device)} | {name: through(peer) for name, peer in _peers(device).items()},
        # Read the output and the noise, write the gradient.
        Work(nbytes=3 * output.nbytes, flops=(_FORWARD + _BACKWARD) * case.elements),
        largest_error(expected),
        TOLERANCES[dtype],
    )


def with_the_noising(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """All that a training step does around the network: noise the data, then the loss and its gradient."""
    output, x0, t = _inputs(case, dtype, device, grad=True)
    key, g = Key(0), torch.ones(case.shape[0], device=device)
    alpha, sigma = (level.to(device, x0.dtype) for level in (add_noise.SCHEDULE.alpha, add_noise.SCHEDULE.sigma))

    def through(function: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            x_t, value = function(output, x0, t, alpha, sigma)
            return x_t, *torch.autograd.grad(value, output, g.to(value.dtype))

        return run

    def both(output: Tensor, x0: Tensor, t: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        x_t, eps = ops.add_noise(x0, t, add_noise.SCHEDULE, key, return_noise=True)
        return x_t, ops.denoising_loss(output, x0, t, add_noise.SCHEDULE, noise=eps)

    def error(result: Any) -> float:
        """Of the noise that is in x_t, and of that in the gradient 2 (output - eps) / n, which must be the same."""
        x_t, gradient = result
        implied = add_noise.implied_noise(x_t, x0, t)
        again = judged(output) - judged(gradient) * (output[:1].numel() / 2)
        apart = (implied - again).abs().max().item() if implied.numel() else 0.0
        return max(noise_error(implied), noise_error(again), apart / _APART[dtype])

    return Comparison(
        {"ours": through(both)}
        | {name: through(peer) for name, peer in peers.eager_and_compiled(noise_and_loss, device).items()},
        # Draw the noise once; read x0 and the output, write x_t and the gradient.
        Work(
            nbytes=4 * x0.nbytes,
            values=case.elements,
            flops=(add_noise.FLOPS + _FORWARD + _BACKWARD) * case.elements,
        ),
        error,
        NOISE_TOLERANCES[dtype],
    )


# What is read back of the noise differs by as much at most, and counts as one standard error where it does.
_APART = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}

BENCHMARKS = (
    Benchmark("denoising_loss", "forward", forward, cases.DIFFUSION, _FLOAT32),
    Benchmark("denoising_loss", "forward and backward", forward_and_backward, cases.DIFFUSION),
    Benchmark("denoising_loss", "with the noising, forward and backward", with_the_noising, cases.DIFFUSION, _FLOAT32),
)
