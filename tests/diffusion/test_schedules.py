"""The schedules' tables against diffusers' own formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusion.peers import in_float64

from gencore import diffusion
from gencore.diffusion import Schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}


def peer_class(name):
    """A class of diffusers. Skips the test where that is not installed."""
    return getattr(pytest.importorskip("diffusers"), name)


def peer(**config):
    scheduler = peer_class("DDPMScheduler")
    with in_float64(scheduler):
        made = scheduler(**config)
    assert made.alphas_cumprod.dtype == torch.float64
    return made


@pytest.mark.parametrize("steps", [1000, 37])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (diffusion.linear, {"beta_schedule": "linear"}),
        (lambda steps: diffusion.linear(steps, 0.00085, 0.012), {"beta_schedule": "linear", **BETAS}),
        (diffusion.scaled_linear, {"beta_schedule": "scaled_linear", **BETAS}),
        (diffusion.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
        (diffusion.sigmoid, {"beta_schedule": "sigmoid"}),
    ],
    ids=["linear", "linear of others", "scaled_linear", "cosine", "sigmoid"],
)
def test_diffusers_has_the_same(make, config, steps):
    schedule, theirs = make(steps), peer(num_train_timesteps=steps, **config)
    assert len(schedule) == steps
    assert (schedule.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 1e-12
    assert (schedule.betas - theirs.betas).abs().max() < 1e-12
    assert (schedule.sigma - (1 - theirs.alphas_cumprod).sqrt()).abs().max() < 1e-12
    assert torch.equal(schedule.times, torch.arange(steps, dtype=torch.float64))


@pytest.mark.parametrize(("name", "make"), [("scaled_linear", diffusion.scaled_linear), ("linear", diffusion.linear)])
def test_zero_terminal_snr(name, make):
    config = BETAS if name == "scaled_linear" else {}
    ours = diffusion.zero_terminal_snr(make())
    theirs = peer(beta_schedule=name, rescale_betas_zero_snr=True, **config)
    assert (ours.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 1e-12
    assert ours.alpha[-1] == 0
    assert ours.sigma[-1] == 1
    assert abs(ours.alpha[0] - make().alpha[0]) < 1e-15


@pytest.mark.parametrize("steps", [18, 40])
def test_karras(steps):
    scheduler = peer_class("EDMEulerScheduler")
    with in_float64(scheduler):
        theirs = scheduler()
        theirs.set_timesteps(steps)
    ours = diffusion.karras(steps)
    assert theirs.sigmas.dtype == torch.float64
    assert ((ours.sigma.flip(0) - theirs.sigmas[:-1]) / theirs.sigmas[:-1]).abs().max() < 1e-12
    assert torch.equal(ours.alpha, torch.ones(steps, dtype=torch.float64))
    assert torch.equal(ours.times, ours.sigma)
    assert (ours.sigma[0], ours.sigma[-1]) == (0.002, 80.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.1])
def test_flow(shift):
    scheduler = peer_class("FlowMatchEulerDiscreteScheduler")
    with in_float64(scheduler):
        theirs = scheduler(shift=shift)
    ours = diffusion.flow(1000, shift)
    assert theirs.sigmas.dtype == torch.float64
    assert (ours.sigma.flip(0) - theirs.sigmas).abs().max() < 1e-12
    assert (ours.times.flip(0) - theirs.timesteps).abs().max() < 1e-9  # 1000 sigma
    assert (ours.alpha + ours.sigma - 1).abs().max() < 1e-15
    assert (ours.alpha[-1], ours.sigma[-1]) == (0, 1)


def test_values_of_the_papers():
    # Ho et al. (2020): what is left of the signal after 1000 steps; Nichol and Dhariwal (2021), equation 17.
    assert math.isclose(diffusion.linear().alphas_cumprod[-1], 4.0358e-5, rel_tol=1e-4)
    f = [math.cos((t / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 25)]
    assert math.isclose(diffusion.cosine(50).alphas_cumprod[24], f[1] / f[0], rel_tol=1e-12)
    assert diffusion.cosine(50).betas[-1] == pytest.approx(0.999, abs=1e-12)
    assert diffusion.flow(4).alpha.tolist() == [0.75, 0.5, 0.25, 0.0]
    assert diffusion.karras(1).sigma.tolist() == [80.0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: diffusion.linear(0), ValueError, "steps must be at least 1, got 0"),
        (lambda: diffusion.cosine(True), TypeError, "steps must be an int, got bool"),
        (lambda: diffusion.flow(2.0), TypeError, "steps must be an int, got float"),
        (lambda: diffusion.linear(10, 0.5, 0.1), ValueError, "beta_start and beta_end must be 0 < beta_start <= "),
        (lambda: diffusion.scaled_linear(10, 0.0, 0.1), ValueError, "beta_start and beta_end must be"),
        (lambda: diffusion.sigmoid(10, 0.1, 1.0), ValueError, "beta_start and beta_end must be"),
        (lambda: diffusion.cosine(10, offset=-1), ValueError, "offset must be at least 0, got -1"),
        (lambda: diffusion.cosine(10, max_beta=1.0), ValueError, r"max_beta must be in \(0, 1\), got 1.0"),
        (
            lambda: diffusion.karras(10, 2.0, 1.0),
            ValueError,
            "sigma_min and sigma_max must be 0 < sigma_min",
        ),
        (lambda: diffusion.karras(10, rho=0.0), ValueError, "rho must be more than 0, got 0.0"),
        (lambda: diffusion.flow(10, shift=0.0), ValueError, "shift must be more than 0, got 0.0"),
        (lambda: diffusion.zero_terminal_snr(diffusion.flow()), ValueError, "schedule must be variance-preserving"),
        (lambda: diffusion.zero_terminal_snr(diffusion.linear(1)), ValueError, "schedule must have at least two steps"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_schedule_of_ones_own():
    assert isinstance(diffusion.linear(), Schedule)
    assert len(Schedule(alpha=[1.0, 1.0], sigma=[0.1, 0.2], times=[3, 5])) == 2
