"""Reparameterized sampling, forward and backward, against PyTorch eager and compiled. Outputs are fresh tensors."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, ops
from gencore.backends import cpu
from gencore.bench import cases, limits
from gencore.bench.measure import interleave
from gencore.bench.peers import eager_and_compiled


def sample(mu, logvar):
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def sample_draws(mu, logvar, draws):
    return mu + torch.exp(0.5 * logvar) * torch.randn(draws, *mu.shape, dtype=mu.dtype)


def sample_kl(mu, logvar):
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    return sample(mu, logvar), kl


def floor(case: cases.Case, tensors: int, draws: int, itemsize: int) -> tuple[float, str]:
    """The larger of moving the tensors and making the noise."""
    memory = limits.memory_floor(itemsize * case.elements * (tensors + draws))
    noise, limit = limits.noise_floor("normal", case.elements * draws)
    return (memory, "memory") if memory > noise else (noise, limit)


def inputs(case: cases.Case, dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    tensors = [torch.randn(case.shape, dtype=dtype).to(memory_format=case.memory_format) for _ in range(2)]
    return [tensor.requires_grad_(grad) for tensor in tensors]


TIMED = cases.timed(cases.REPARAMETERIZE)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("case", TIMED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(case, dtype, compare):
    mu, logvar = inputs(case, dtype, grad=False)
    key, draws = Key(0), case.draws
    peers = eager_and_compiled(sample if draws is None else lambda m, v: sample_draws(m, v, draws))
    compare(
        lambda: ops.reparameterize(mu, logvar, key, num_samples=draws),
        {name: lambda peer=peer: peer(mu, logvar) for name, peer in peers.items()},
        *floor(case, 2, draws or 1, mu.element_size()),
    )


@pytest.mark.parametrize("case", [case for case in TIMED if case.draws is None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["z", "z_and_kl"])
def test_forward_and_backward(op, case, dtype, compare):
    mu, logvar = inputs(case, dtype, grad=True)
    key, g = Key(0), torch.randn_like(mu)
    g_kl = torch.ones(case.shape[0], dtype=dtype)

    def through(function):
        def run():
            outputs = function(mu, logvar)
            grads = (g,) if op == "z" else (g, g_kl.to(outputs[1].dtype))
            return torch.autograd.grad(outputs, (mu, logvar), grads)

        return run

    ours = ops.reparameterize if op == "z" else ops.reparameterize_kl
    peers = eager_and_compiled(sample if op == "z" else sample_kl)
    # Read mu, logvar and write z; read logvar and grad_z and write the gradients (that of mu may be grad_z itself).
    tensors = 5 if op == "z" else 7
    memory = limits.memory_floor(mu.element_size() * case.elements * tensors)
    noise, limit = limits.noise_floor("normal", 2 * case.elements)
    compare(
        through(lambda m, v: ours(m, v, key)),
        {name: through(peer) for name, peer in peers.items()},
        *((memory, "memory") if memory > noise else (noise, limit)),
    )


def test_call_overhead(compare):
    """Four elements: what the call costs over the compiled kernel, which is called with its addresses ready."""
    mu, logvar = (torch.randn(1, 4) for _ in range(2))
    key, z = Key(0), torch.empty(1, 4)
    addresses = (mu.data_ptr(), logvar.data_ptr(), z.data_ptr(), 0, 0, 1, 1, 4, 0, key.packed.data_ptr(), 0, 1)
    kernel = interleave({"kernel": lambda: cpu._cpu.reparameterize(*addresses)})["kernel"].median
    compare(
        lambda: ops.reparameterize(mu, logvar, key),
        {
            "kernel alone": lambda: cpu._cpu.reparameterize(*addresses),
            "mu + 1": lambda: mu + 1,
            "eager": lambda: sample(mu, logvar),
        },
        kernel,
        "the kernel alone",
    )
