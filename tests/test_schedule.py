"""What follows from the levels of a schedule."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gencore import diffusion
from gencore.schedule import Schedule, posterior

PARAMETERIZATIONS = ("eps", "x0", "v", "velocity")
SCHEDULES = [diffusion.linear(50), diffusion.cosine(50), diffusion.flow(51, 2.0), diffusion.karras(20)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("predicts", PARAMETERIZATIONS)
def test_prediction_undoes_target(schedule, predicts):
    """x0 = a x + b (p x0 + q eps) for every x0 and eps."""
    if predicts == "eps" and schedule.alpha[-1] == 0:
        schedule = Schedule(schedule.alpha[:-1], schedule.sigma[:-1])
    (a, b), (p, q) = schedule.prediction(predicts), schedule.target(predicts)
    assert (a * schedule.alpha + b * p - 1).abs().max() < 1e-12
    assert ((a * schedule.sigma + b * q) / (1 + schedule.sigma)).abs().max() < 1e-12


def test_targets_of_the_papers():
    schedule = Schedule([0.8], [0.6])
    assert [torch.cat(schedule.target(name)).tolist() for name in PARAMETERIZATIONS] == [
        [0, 1], [1, 0], [-0.6, 0.8], [-1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("predicts", PARAMETERIZATIONS)
def test_weights_weigh_the_error_of_x0(predicts):
    """An error e of the output is one of b e in x0, whose square is weighed with SNR, or min(SNR, gamma)."""
    schedule = diffusion.linear(50)
    b = schedule.prediction(predicts)[1]
    for weighting, of_x0 in (("snr", schedule.snr), ("min_snr", schedule.snr.clamp(max=3.0))):
        weight = schedule.weight(predicts, weighting, gamma=3.0)
        torch.testing.assert_close(weight, of_x0 * b.square(), rtol=1e-12, atol=0)
    assert torch.equal(schedule.weight(predicts), torch.ones(50, dtype=torch.float64))
    own = torch.arange(50)
    assert torch.equal(schedule.weight(predicts, own), own.double())


def test_the_noises_weight_of_pure_noise_is_finite():
    schedule = diffusion.zero_terminal_snr(diffusion.linear(20))
    assert schedule.weight("eps", "snr")[-1] == 1
    assert schedule.weight("eps", "min_snr")[-1] == 1
    assert schedule.weight("v", "min_snr")[-1] == 0


def test_posterior_is_that_of_the_gaussians():
    """q(x' | x, x0) from the joint distribution of x' and x given x0."""
    schedule = diffusion.linear(30)
    betas, small, of_x0, of_x = posterior(schedule.alphas_cumprod)
    for t in range(1, 30):
        before, now = schedule.alphas_cumprod[t - 1], schedule.alphas_cumprod[t]
        covariance = (now / before).sqrt() * (1 - before)
        gain = covariance / (1 - now)
        assert math.isclose(of_x[t], gain, rel_tol=1e-9)
        assert math.isclose(of_x0[t], before.sqrt() - gain * now.sqrt(), rel_tol=1e-9)
        assert math.isclose(small[t], 1 - before - gain * covariance, rel_tol=1e-9)
        assert math.isclose(betas[t], 1 - now / before, rel_tol=1e-12)
    assert small[0] == 0
    assert (of_x0[0], of_x[0]) == (pytest.approx(1.0, abs=1e-12), 0)


def test_log_variances():
    schedule = diffusion.linear(30)
    betas, small, _, _ = posterior(schedule.alphas_cumprod)
    low, high = schedule.log_variance("learned_range")
    assert torch.equal(low[1:], small[1:].log())
    assert torch.equal(high, betas.log())
    assert low[0] == low[1]
    assert schedule.log_variance("fixed_small")[1].equal(low)
    large = schedule.log_variance("fixed_large")[0]
    assert large[1:].equal(betas[1:].log())
    assert large[0] == low[1]


def test_kinds_of_schedules():
    assert diffusion.linear(10).is_variance_preserving
    assert not diffusion.flow(10).is_variance_preserving
    assert not diffusion.karras(10).is_variance_preserving
    torch.testing.assert_close(diffusion.linear(10).betas, torch.linspace(1e-4, 0.02, 10, dtype=torch.float64))


def test_a_schedule_is_a_value():
    schedule = diffusion.cosine(20)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert schedule == diffusion.cosine(20)
    assert schedule != diffusion.cosine(21)
    assert schedule != diffusion.linear(20)
    assert schedule != 3
    assert repr(diffusion.flow(4)) == "Schedule(4 steps, sigma / alpha from 0.3333 to inf)"
    assert len(schedule) == 20
    for name in ("alpha", "sigma", "times"):
        assert getattr(schedule, name).dtype == torch.float64
        with pytest.raises(AttributeError, match=f"a Schedule is immutable: cannot set '{name}'"):
            setattr(schedule, name, torch.zeros(20))


def test_the_arguments_are_copied():
    sigma = torch.tensor([0.1, 0.2], dtype=torch.float64)
    schedule = Schedule([1.0, 1.0], sigma)
    sigma[0] = 5.0
    assert schedule.sigma[0] == 0.1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Schedule("no", [1.0]), TypeError, "alpha must be numbers, one per step, got str"),
        (lambda: Schedule([], []), ValueError, r"alpha must be one number per step, of shape \(T,\), got shape \(0,\)"),
        (lambda: Schedule([[1.0]], [1.0]), ValueError, r"alpha must be .* got shape \(1, 1\)"),
        (lambda: Schedule([1.0], [0.1, 0.2]), ValueError, "sigma must have the length of alpha, 1, got 2"),
        (lambda: Schedule([1.0], [0.1], [1, 2]), ValueError, "times must have the length of alpha, 1, got 2"),
        (lambda: Schedule([-1.0], [0.1]), ValueError, "alpha must be at least 0, got -1"),
        (lambda: Schedule([1.0], [0.0]), ValueError, "sigma must be more than 0, got 0"),
        (lambda: Schedule([1.0], [math.nan]), ValueError, "sigma must be finite, got nan"),
        (
            lambda: Schedule([1.0, 1.0], [0.2, 0.2]),
            ValueError,
            "must rise from step to step, but falls or stays at step 1",
        ),
        (lambda: diffusion.flow(4).prediction("eps"), ValueError, "parameterization must be v, x0 or velocity"),
        (lambda: diffusion.flow(4).prediction("noise"), ValueError, "parameterization must be one of .* got 'noise'"),
        (lambda: diffusion.linear(4).target("noise"), ValueError, "parameterization must be one of"),
        (lambda: diffusion.linear(4).weight("eps", "none"), ValueError, "weighting must be one of"),
        (
            lambda: diffusion.linear(4).weight("eps", torch.ones(3)),
            ValueError,
            "weighting must have one value per step, 4",
        ),
        (lambda: diffusion.linear(4).weight("eps", "min_snr", 0.0), ValueError, "gamma must be more than 0, got 0.0"),
        (lambda: diffusion.linear(4).log_variance("learned"), ValueError, "variance must be one of"),
        (lambda: diffusion.linear(1).log_variance("fixed_small"), ValueError, "must have at least two steps"),
        (lambda: diffusion.flow(4).log_variance("fixed_small"), ValueError, "schedule must be variance-preserving"),
        (lambda: diffusion.karras(4).betas, ValueError, "schedule must be variance-preserving"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


MAKERS = (
    diffusion.linear, diffusion.scaled_linear, diffusion.cosine, diffusion.sigmoid, diffusion.karras, diffusion.flow,
    lambda steps: diffusion.zero_terminal_snr(diffusion.linear(steps)), lambda steps: Schedule([0.9, 0.5], [0.1, 0.5]),
)  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_a_schedule_has_its_values_wherever_it_is_made(make, mode):
    """A model is built on the meta device before its weights are loaded; the schedule is no weight."""
    want, sampler = make(10), diffusion.euler(make(10), parameterization="x0")
    with mode():
        schedule = make(10)
        made = diffusion.euler(schedule, parameterization="x0")
    assert schedule == want
    for name in ("rows", "levels", "times"):
        assert torch.equal(getattr(made, name), getattr(sampler, name))


def test_a_schedule_of_tensors_without_values_is_refused():
    levels = torch.ones(3, device="meta")
    with pytest.raises(TypeError, match="alpha must be numbers, one per step, got a tensor without values"):
        Schedule(levels, levels)


def test_a_schedule_is_loaded_without_running_code():
    schedule, file = diffusion.cosine(20), io.BytesIO()
    torch.save({"schedule": schedule}, file)
    for place in ("cpu", "meta"):
        file.seek(0)
        assert torch.load(file, weights_only=True, map_location=place)["schedule"] == schedule


def test_copies_of_a_schedule_share_its_tables():
    schedule = diffusion.linear(10)
    for other in (copy.copy(schedule), copy.deepcopy({"schedule": schedule})["schedule"]):
        assert other == schedule
        assert other.add_noise_table(torch.device("cpu")) is schedule.add_noise_table(torch.device("cpu"))
