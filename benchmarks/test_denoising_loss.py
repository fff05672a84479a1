"""The training loss, forward and backward, against PyTorch eager and compiled."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, diffusion, ops
from gencore.bench import cases, limits
from gencore.bench.peers import eager_and_compiled

CASES = cases.DIFFUSION
SCHEDULE = diffusion.linear()


def inputs(case, dtype, device):
    output, x0 = (
        torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format) for _ in range(2)
    )
    return output.requires_grad_(), x0, torch.randint(len(SCHEDULE), case.shape[:1], device=device)


def loss(output, eps):
    return (output.float() - eps.float()).square().flatten(1).mean(1)


def noise_and_loss(output, x0, t, alpha, sigma):
    eps, shape = torch.randn_like(x0), (-1, *[1] * (x0.dim() - 1))
    x_t = alpha[t].view(shape) * x0 + sigma[t].view(shape) * eps
    return x_t, loss(output, eps)


def test_forward(case, device, compare, our_triton):
    """The loss alone, given the noise or making it."""
    output, x0, t = (tensor.detach() for tensor in inputs(case, torch.float32, device))
    key, eps = Key(0), torch.randn_like(x0)
    table = SCHEDULE.loss_table(x0.device, "eps", "simple", 5.0, None, 0.0)
    peers = eager_and_compiled(loss, device)
    peers.pop("compile, fallback RNG", None)
    compare(
        lambda: ops.denoising_loss(output, x0, t, SCHEDULE, key),
        {name: lambda peer=peer: peer(output, eps) for name, peer in peers.items()}
        | our_triton("denoising_loss", output, x0, table, t, key.packed),
        *limits.floor(x0.nbytes, case.elements, device),
        nbytes=x0.nbytes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(case, dtype, device, compare):
    """PyTorch's functions are given the noise, which ours make twice."""
    output, x0, t = inputs(case, dtype, device)
    key, g, eps = Key(0), torch.ones(case.shape[0], device=device), torch.randn_like(x0)

    def through(function):
        return lambda: torch.autograd.grad(function(), output, g)

    # Read the output twice, write its gradient; a network that predicts the noise has no x0 in its target.
    nbytes = 3 * x0.nbytes
    peers = eager_and_compiled(loss, device)
    peers.pop("compile, fallback RNG", None)
    compare(
        through(lambda: ops.denoising_loss(output, x0, t, SCHEDULE, key)),
        {name: through(lambda peer=peer: peer(output, eps)) for name, peer in peers.items()},
        *limits.floor(nbytes, 2 * case.elements, device),
        nbytes=nbytes,
    )


def test_with_the_noising(case, device, compare):
    """All that a training step does around the network: noise the data, then the loss and its gradient."""
    output, x0, t = inputs(case, torch.float32, device)
    key, g = Key(0), torch.ones(case.shape[0], device=device)
    alpha, sigma = (level.to(device, x0.dtype) for level in (SCHEDULE.alpha, SCHEDULE.sigma))

    def ours():
        x_t = ops.add_noise(x0, t, SCHEDULE, key)
        return x_t, torch.autograd.grad(ops.denoising_loss(output, x0, t, SCHEDULE, key), output, g)

    def through(function):
        def run():
            x_t, value = function(output, x0, t, alpha, sigma)
            return x_t, torch.autograd.grad(value, output, g)

        return run

    compare(
        ours,
        {name: through(peer) for name, peer in eager_and_compiled(noise_and_loss, device).items()},
        *limits.floor(5 * x0.nbytes, 3 * case.elements, device),
        nbytes=5 * x0.nbytes,
    )
