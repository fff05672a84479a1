"""A sampler's step, against PyTorch eager and compiled, and diffusers where there is one."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, diffusion, nn, ops
from gencore.bench import cases, limits
from gencore.bench.peers import diffusers_scheduler, eager_and_compiled

CASES = cases.DIFFUSION
SCHEDULE = diffusion.linear()
STEPS, T = 50, 500


def ddpm(x, output, predict_x, predict_output, of_x, of_x0, noise):
    x0 = (predict_x * x + predict_output * output).clamp(-1, 1)
    return of_x * x + of_x0 * x0 + noise * torch.randn_like(x)


def ddim(x, output, predict_x, predict_output, of_x0, direct):
    x0 = (predict_x * x + predict_output * output).clamp(-1, 1)
    return of_x0 * x0 + direct * output


def step_of(sampler):
    """(ours' coefficients at the timestep T, the columns that the peers need, their function, diffusers' class)."""
    made = getattr(diffusion, sampler)(SCHEDULE, STEPS, clip=1.0, spacing="leading")
    call = next(i for i, time in enumerate(made.times.tolist()) if time == T)
    row = made.rows[call]
    names = ("predict_x", "predict_output", *(("x", "x0", "noise") if sampler == "ddpm" else ("x0", "direct")))
    values = [row[ops.STEP_COLUMNS.index(name)].item() for name in names]
    return row, values, *((ddpm, "DDPMScheduler") if sampler == "ddpm" else (ddim, "DDIMScheduler"))


def run(sampler, case, dtype, device, compare, into, triton=None):
    row, values, function, theirs = step_of(sampler)
    x, output = (
        torch.randn(case.shape, dtype=dtype, device=device).to(memory_format=case.memory_format) for _ in range(2)
    )
    key, out = Key(0), torch.empty_like(x) if into else None
    peers = {
        name: lambda peer=peer: peer(x, output, *values) for name, peer in eager_and_compiled(function, device).items()
    }
    scheduler = diffusers_scheduler(theirs, device, STEPS)
    if scheduler is not None:
        peers["diffusers"] = lambda: scheduler.step(output, T, x).prev_sample
    if triton is not None:
        peers |= triton("diffusion_step", x, output, None, None, None, None, None, row[None], key.packed)
    making = case.elements if sampler == "ddpm" else 0
    compare(
        lambda: ops.diffusion_step(x, output, row, key, out=out),
        peers,
        *limits.floor(3 * x.nbytes, making, device),
        nbytes=3 * x.nbytes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_step(sampler, case, dtype, device, compare, our_triton):
    run(sampler, case, dtype, device, compare, False, our_triton)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_step_into(sampler, case, device, compare):
    """Into a tensor that is there, as a sampling loop does, which PyTorch's functions cannot do in one."""
    run(sampler, case, torch.float32, device, compare, True)


def test_sampling_loop(device, compare, request):
    """The loop and its 50 steps without a network, and with the one of the MNIST model: the ratio is the share."""
    if device != request.config.getoption("device"):
        pytest.skip("a network takes the emulator minutes")
    shape, sampler, key = (4, 1, 28, 28), diffusion.ddim(SCHEDULE, STEPS), Key(0)
    network = nn.UNet(in_channels=1, channels=(32, 64, 64), num_groups=8, num_classes=10).to(device)
    output = torch.randn(shape, device=device)

    def sampled(model):
        return lambda: diffusion.sample(model, shape, sampler, key, device=device)

    compare(
        sampled(lambda x, t: output),
        {"with the network": sampled(network)},
        limits.memory_floor(3 * STEPS * output.nbytes, device),
        "memory",
    )
