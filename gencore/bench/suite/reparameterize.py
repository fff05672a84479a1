"""Reparameterized sampling, forward and backward, against PyTorch eager and compiled. Outputs are fresh tensors.

What a result says of the noise, (z - mu) / exp(logvar / 2), must be standard normal; what has no noise in it, right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gencore import Key, ops
from gencore.bench import cases, peers
from gencore.bench.cases import Case
from gencore.bench.limits import Work
from gencore.bench.suite.base import (
    NOISE_TOLERANCES,
    TOLERANCES,
    Benchmark,
    Comparison,
    bound,
    judged,
    largest_error,
    noise_error,
    on_backends,
)

# Operations per value: half of logvar and its exponential; times eps and plus mu for each draw. Backward, of logvar:
# the scale again, and three products. The divergence: a square, an exponential and four sums; backward, two products
# and a sum more for each gradient.
_SCALE, _DRAW, _BACKWARD, _KL, _KL_BACKWARD = 2, 2, 5, 6, 6


def sample(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def _sample_draws(draws: int) -> Callable[[Tensor, Tensor], Tensor]:
    def sampled(mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + torch.exp(0.5 * logvar) * torch.randn(draws, *mu.shape, dtype=mu.dtype, device=mu.device)

    return sampled


def _sample_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    return sample(mu, logvar), kl


def _inputs(case: Case, dtype: torch.dtype, device: str, grad: bool = False) -> tuple[Tensor, Tensor]:
    mu, logvar = (
        torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format).requires_grad_(grad)
        for _ in range(2)
    )
    return mu, logvar


def forward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    mu, logvar = _inputs(case, dtype, device)
    key, draws = Key(0), case.draws
    many = draws or 1

    def ours() -> Tensor:
        return ops.reparameterize(mu, logvar, key, num_samples=draws)

    def error(z: Tensor) -> float:
        scale = torch.exp(judged(logvar) / 2)
        if draws is None:
            return noise_error((judged(z) - judged(mu)) / scale)
        # Draws are the first dimension.
        return noise_error(torch.stack([(judged(draw) - judged(mu)) / scale for draw in z]))

    functions = peers.eager_and_compiled(sample if draws is None else _sample_draws(draws), device)
    return Comparison(
        {"ours": ours, **on_backends(ours, device)} | bound(functions, mu, logvar),
        Work(
            nbytes=mu.nbytes * (2 + many),
            values=case.elements * many,
            flops=case.elements * (_SCALE + _DRAW * many),
        ),
        error,
        NOISE_TOLERANCES[dtype],
    )


def _gradient_error(mu: Tensor, logvar: Tensor, g: Tensor, kl: bool, dtype: torch.dtype) -> Callable[[Any], float]:
    """Of the gradients of mu and logvar, where that of z is ``g`` and that of the divergence, if there is one, 1."""
    of_mu = largest_error(lambda: g.double() + (mu.detach().double() if kl else 0))

    def error(result: Any) -> float:
        if of_mu(result[0]) > TOLERANCES[dtype]:
            return math.inf
        scale, gradient = torch.exp(judged(logvar) / 2), judged(result[1])
        of_kl = (scale.square() - 1) / 2 if kl else 0
        return noise_error((gradient - of_kl) * 2 / (judged(g) * scale))

    return error


def _forward_and_backward(case: Case, dtype: torch.dtype, device: str, kl: bool) -> Comparison:
    mu, logvar = _inputs(case, dtype, device, grad=True)
    # From 1 to 2, so that the noise can be told from what it was multiplied with.
    key, g = Key(0), 1 + torch.rand_like(mu).detach()
    g_kl = torch.ones(case.shape[0], dtype=dtype, device=device)
    op = ops.reparameterize_kl if kl else ops.reparameterize

    def through(function: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            outputs = function(mu, logvar)
            grads = (g, g_kl.to(outputs[1].dtype)) if kl else (g,)
            return torch.autograd.grad(outputs, (mu, logvar), grads)

        return run

    ours = through(lambda mu, logvar: op(mu, logvar, key))
    functions = peers.eager_and_compiled(_sample_kl if kl else sample, device)
    flops = _SCALE + _DRAW + _BACKWARD + ((_KL + _KL_BACKWARD) if kl else 0)
    return Comparison(
        {"ours": ours, **on_backends(ours, device)} | {name: through(peer) for name, peer in functions.items()},
        Work(
            # Read mu, logvar and write z; read logvar and grad_z and write that of logvar (that of mu may be grad_z
            # itself). With the divergence, mu is read again and its gradient written.
            nbytes=mu.nbytes * (8 if kl else 6),
            values=case.elements,
            flops=case.elements * flops,
        ),
        _gradient_error(mu, logvar, g, kl, dtype),
        NOISE_TOLERANCES[dtype],
    )


def forward_and_backward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _forward_and_backward(case, dtype, device, kl=False)


def kl_forward_and_backward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    return _forward_and_backward(case, dtype, device, kl=True)


def backward(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """Of a graph that is kept."""
    leaves = _inputs(case, dtype, device, grad=True)
    g = 1 + torch.rand_like(leaves[0]).detach()

    def back(function: Callable[..., Tensor]) -> Callable[[], Any]:
        z = function(*leaves)
        return lambda: torch.autograd.grad(z, leaves, g, retain_graph=True)

    ours = back(lambda mu, logvar: ops.reparameterize(mu, logvar, Key(0)))
    saved = back(lambda mu, logvar: ops.reparameterize(mu, logvar, Key(0), save_noise=True))
    return Comparison(
        {"ours": ours, **on_backends(ours, device), "ours, noise saved": saved, "eager": back(sample)},
        # Noise is read where it was saved, and logvar where it was not.
        Work(nbytes=3 * g.nbytes, flops=_BACKWARD * case.elements),
        _gradient_error(*leaves, g, False, dtype),
        NOISE_TOLERANCES[dtype],
        # Its forward pass was on another stream than a capture is.
        clock="calls" if device == "cuda" else None,
    )


def _draws_once(case: Case) -> bool:
    return case.draws is None


BENCHMARKS = (
    Benchmark("reparameterize", "forward", forward, cases.REPARAMETERIZE),
    Benchmark("reparameterize", "forward and backward", forward_and_backward, cases.REPARAMETERIZE, fits=_draws_once),
    Benchmark(
        "reparameterize", "KL, forward and backward", kl_forward_and_backward, cases.REPARAMETERIZE, fits=_draws_once
    ),
    Benchmark("reparameterize", "backward", backward, cases.REPARAMETERIZE, fits=_draws_once),
)
