"""Noising a batch, each sample to its own step, against PyTorch eager and compiled, and diffusers where it is there."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, diffusion, ops
from gencore.bench import cases, limits
from gencore.bench.peers import diffusers_scheduler, eager_and_compiled

CASES = cases.DIFFUSION
SCHEDULE = diffusion.linear()


def noised(x0, t, alpha, sigma):
    shape = (-1, *[1] * (x0.dim() - 1))
    return alpha[t].view(shape) * x0 + sigma[t].view(shape) * torch.randn_like(x0)


def peers_of(x0, t, device):
    alpha, sigma = (level.to(device, x0.dtype) for level in (SCHEDULE.alpha, SCHEDULE.sigma))
    peers = {
        name: lambda peer=peer: peer(x0, t, alpha, sigma) for name, peer in eager_and_compiled(noised, device).items()
    }
    scheduler = diffusers_scheduler("DDPMScheduler", device)
    if scheduler is not None:
        peers["diffusers"] = lambda: scheduler.add_noise(x0, torch.randn_like(x0), t)
    return peers


def inputs(case, dtype, device):
    x0 = torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format)
    return x0, torch.randint(len(SCHEDULE), case.shape[:1], device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward(case, dtype, device, compare, our_triton):
    x0, t = inputs(case, dtype, device)
    key = Key(0)
    compare(
        lambda: ops.add_noise(x0, t, SCHEDULE, key),
        peers_of(x0, t, device)
        | our_triton("add_noise", x0, SCHEDULE.add_noise_table(x0.device), t, key.packed, False),
        *limits.floor(2 * x0.nbytes, case.elements, device),
        nbytes=2 * x0.nbytes,
    )


def test_forward_into(case, device, compare):
    """Into a tensor that is there, which PyTorch's functions cannot do in one."""
    x0, t = inputs(case, torch.float32, device)
    key, out = Key(0), torch.empty_like(x0)
    compare(
        lambda: ops.add_noise(x0, t, SCHEDULE, key, out=out),
        peers_of(x0, t, device),
        *limits.floor(2 * x0.nbytes, case.elements, device),
        nbytes=2 * x0.nbytes,
    )
