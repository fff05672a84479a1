"""Reparameterized sampling, forward and backward, against PyTorch eager and compiled. Outputs are fresh tensors."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, ops
from gencore.backends import choice
from gencore.bench import cases, limits
from gencore.bench.measure import interleave
from gencore.bench.peers import eager_and_compiled


def sample(mu, logvar):
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def sample_draws(mu, logvar, draws):
    return mu + torch.exp(0.5 * logvar) * torch.randn(draws, *mu.shape, dtype=mu.dtype, device=mu.device)


def sample_kl(mu, logvar):
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    return sample(mu, logvar), kl


def inputs(case: cases.Case, dtype: torch.dtype, device: str, grad: bool) -> list[torch.Tensor]:
    tensors = [
        torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format) for _ in range(2)
    ]
    return [tensor.requires_grad_(grad) for tensor in tensors]


CASES = cases.REPARAMETERIZE
ONLY = dict.fromkeys(("test_forward_and_backward", "test_backward"), lambda case: case.draws is None)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(case, dtype, device, compare, our_triton):
    mu, logvar = inputs(case, dtype, device, grad=False)
    key, draws = Key(0), case.draws
    nbytes = mu.nbytes * (2 + (draws or 1))
    peers = eager_and_compiled(sample if draws is None else lambda m, v: sample_draws(m, v, draws), device)
    compare(
        lambda: ops.reparameterize(mu, logvar, key, num_samples=draws),
        {name: lambda peer=peer: peer(mu, logvar) for name, peer in peers.items()}
        | our_triton("reparameterize", mu, logvar, key.packed, draws),
        *limits.floor(nbytes, case.elements * (draws or 1), device),
        nbytes=nbytes,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["z", "z_and_kl"])
def test_forward_and_backward(op, case, dtype, device, compare):
    mu, logvar = inputs(case, dtype, device, grad=True)
    key, g = Key(0), torch.randn_like(mu)
    g_kl = torch.ones(case.shape[0], dtype=dtype, device=device)

    def through(function):
        def run():
            outputs = function(mu, logvar)
            grads = (g,) if op == "z" else (g, g_kl.to(outputs[1].dtype))
            return torch.autograd.grad(outputs, (mu, logvar), grads)

        return run

    ours = ops.reparameterize if op == "z" else ops.reparameterize_kl
    peers = eager_and_compiled(sample if op == "z" else sample_kl, device)
    # Read mu, logvar and write z; read logvar and grad_z and write that of logvar (that of mu may be grad_z itself).
    nbytes = mu.nbytes * (6 if op == "z" else 8)
    compare(
        through(lambda m, v: ours(m, v, key)),
        {name: through(peer) for name, peer in peers.items()},
        *limits.floor(nbytes, 2 * case.elements, device),
        nbytes=nbytes,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(case, dtype, device, compare):
    """The backward pass alone, of a graph that is kept."""
    leaves = inputs(case, dtype, device, grad=True)
    g = torch.randn_like(leaves[0])

    def back(function):
        z = function(*leaves)
        return lambda: torch.autograd.grad(z, leaves, g, retain_graph=True)

    compare(
        back(lambda mu, logvar: ops.reparameterize(mu, logvar, Key(0))),
        {"eager": back(sample)},
        *limits.floor(3 * g.nbytes, case.elements, device),
        nbytes=3 * g.nbytes,
    )


def test_call_overhead(device, compare, request):
    """Four elements: what the call costs over the compiled kernel, which is called with its addresses ready."""
    if device != request.config.getoption("device"):
        pytest.skip("the emulator wants to be told of every address before a call")
    mu, logvar = (torch.randn(1, 4, device=device) for _ in range(2))
    key, z = Key(0), torch.empty(1, 4, device=device)
    backend = choice.load(choice.choose(mu.device))
    # Key and tensors outlive the calls, so their addresses and the place can be asked for once.
    arguments = (
        mu.data_ptr(), logvar.data_ptr(), z.data_ptr(), 0, 0, 1, 1, 4, 0, key.packed.data_ptr(), 0,
        *backend._place_of_key(key.packed), *backend._place(mu),
    )  # fmt: skip

    def kernel() -> None:
        backend._module.reparameterize(*arguments)

    compare(
        lambda: ops.reparameterize(mu, logvar, key),
        {"kernel alone": kernel, "mu + 1": lambda: mu + 1, "eager": lambda: sample(mu, logvar)},
        interleave({"kernel": kernel})["kernel"].median,
        "the kernel alone",
        # What the host takes: nobody waits for the GPU.
        clock="cpu",
    )
