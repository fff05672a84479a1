"""Exact proofs: for Gaussian data the optimal denoiser is known, and every sampler is an affine map of its noise.

A batch of probes, one with no noise and one for each element of each noise tensor, finds that map by one run of the
loop. Mean and covariance of what the sampler gives follow without drawing a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gencore import Key, diffusion, ops
from gencore.backends.reference.diffusion_step import diffusion_step
from gencore.diffusion import Sampler, Schedule

SIZE = 3
MEAN = torch.tensor([0.6, -0.3, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.25]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
UNIT = torch.eye(SIZE, dtype=torch.float64)
PARAMETERIZATIONS = ("eps", "x0", "v", "velocity")


def denoiser(
    sampler: Sampler, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE
) -> Callable[[Tensor, Tensor], Tensor]:
    """What a network that has learned N(mean, covariance) says at each call, in the sampler's parameterization."""
    call = iter(sampler.levels[:-1].tolist())

    def model(x: Tensor, t: Tensor) -> Tensor:
        # By the number of the call: the time in float32 would not say the level to the last digit.
        alpha, sigma = next(call)
        # E[x0 | x] = m + alpha S (alpha^2 S + sigma^2)^-1 (x - alpha m)
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * UNIT)
        x0 = mean + (x - alpha * mean) @ gain.T
        eps = (x - alpha * x0) / sigma
        kinds = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}
        return kinds[sampler.parameterization]

    return model


def affine_maps(sampler: Sampler, model: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(calls + 1, d) what each state is without noise, and (calls + 1, uses, d, d) what it is of each noise tensor.

    The loop runs as it is, on the definition of its op, where noise is that of the probes instead of the key's.
    """
    # A call's stream is not its place: a step of the schedule has its own.
    places = {0: 0, **{stream: 1 + call for call, stream in enumerate(sampler.streams)}}
    probes = 1 + len(places) * SIZE

    def step(x: Tensor, output: Any, rows: Tensor, key: Key, *, history: Any = (), out: Tensor, **given: Any) -> Tensor:
        noise = torch.zeros(probes, SIZE, dtype=torch.float64)
        first = 1 + places[int(key.packed[1])] * SIZE
        noise[first : first + SIZE] = UNIT
        h0 = history[0] if history else None
        y, x0 = diffusion_step(x, output, None, h0, None, None, None, rows.unsqueeze(0), noise)
        if given["prediction" if output is not None else "known"] is not None:
            given["prediction"].copy_(x0)
        return out.copy_(y)

    options = {"dtype": torch.float64, "return_trajectory": True}
    with mock.patch.object(ops, "diffusion_step", step):
        states = diffusion.sample(model, (probes, SIZE), sampler, Key(0), **options)
    still = states[:, 0]
    return still, (states[:, 1:] - still[:, None]).reshape(len(states), len(places), SIZE, SIZE).mT


def moments(sampler: Sampler, exact_start: bool = False, **data: Tensor) -> tuple[Tensor, Tensor]:
    """(calls + 1, d) and (calls + 1, d, d): mean and covariance of every state.

    With ``exact_start`` the sampler begins with the data's noised distribution instead of noise alone.
    """
    still, maps = affine_maps(sampler, denoiser(sampler, **data))
    of_start, of_noise = maps[:, 0], maps[:, 1:]
    means = still
    if exact_start:
        alpha, sigma = sampler.levels[0].tolist()
        mean, covariance = data.get("mean", MEAN), data.get("covariance", COVARIANCE)
        root = torch.linalg.cholesky(alpha**2 * covariance + sigma**2 * UNIT)
        of_start = of_start @ root / sampler.initial_scale
        means = still + (maps[:, 0] @ (alpha * mean)) / sampler.initial_scale
    return means, of_start @ of_start.mT + (of_noise @ of_noise.mT).sum(1)


def marginals(sampler: Sampler, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> tuple[Tensor, Tensor]:
    """Mean and covariance of alpha x0 + sigma eps at every level of the sampler."""
    alpha, sigma = sampler.levels.unbind(1)
    return alpha[:, None] * mean, alpha[:, None, None] ** 2 * covariance + sigma[:, None, None] ** 2 * UNIT


def error(sampler: Sampler, at: int = -1, **options: Any) -> float:
    """How far mean and covariance of a state are from the data's, noised to its level."""
    means, covariances = moments(sampler, **options)
    true_means, true_covariances = marginals(sampler)
    return ((means - true_means)[at].norm() + (covariances - true_covariances)[at].norm()).item()


def order(make: Callable[[int], Sampler], steps: int, **options: Any) -> float:
    """The order of convergence: log2 of what twice the steps divide the error by."""
    return math.log2(error(make(steps), **options) / error(make(2 * steps), **options))


# --- What is exact at any number of steps


@pytest.mark.parametrize("schedule", [diffusion.linear(), diffusion.cosine(200)], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("predicts", PARAMETERIZATIONS)
def test_ddpm_with_the_large_variance_is_exact_for_white_data(schedule, steps, predicts):
    """Ho et al. (2020), section 3.2: beta is the right variance for x0 ~ N(0, I)."""
    sampler = diffusion.ddpm(schedule, steps, variance="fixed_large", parameterization=predicts)
    data = {"mean": 0 * MEAN, "covariance": UNIT}
    means, covariances = moments(sampler, **data)
    # The last step adds no noise: it gives E[x0 | x], which here is alpha x.
    last = sampler.levels[-2, 0] ** 2 * UNIT
    assert means.abs().max() == 0
    assert (covariances[:-1] - UNIT).abs().max() < 1e-9
    assert (covariances[-1] - last).abs().max() < 1e-9


@pytest.mark.parametrize("schedule", [diffusion.linear(), diffusion.flow(100)], ids=["linear", "flow"])
@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("make", [diffusion.ddpm, diffusion.euler_ancestral], ids=["ddpm", "euler_ancestral"])
def test_the_small_variance_is_exact_for_one_point(schedule, steps, make):
    """Ho et al. (2020), section 3.2: beta~ is the right variance for data that is one point, whatever the path."""
    sampler = make(schedule, steps, parameterization="v")
    data = {"mean": MEAN, "covariance": 0 * UNIT}
    means, covariances = moments(sampler, exact_start=True, **data)
    true_means, true_covariances = marginals(sampler, **data)
    assert (means - true_means).abs().max() < 1e-9
    assert (covariances - true_covariances).abs().max() < 1e-9
    assert covariances[-1].abs().max() < 1e-12


@pytest.mark.parametrize("deviation", [0.3, 0.7, 1.0])
def test_a_variance_between_is_exact_for_data_between(deviation):
    """p(x' | x) of data N(m, s^2) has the variance beta~ + (what the mean takes of x0)^2 Var(x0 | x)."""
    schedule = diffusion.linear(200)
    sampler = diffusion.ddpm(schedule, 25, variance="learned_range", parameterization="x0")
    data = {"mean": MEAN, "covariance": deviation**2 * UNIT}
    predict, calls = denoiser(sampler, **data), iter(range(len(sampler)))
    columns = {name: sampler.rows[:, i] for i, name in enumerate(ops.STEP_COLUMNS)}

    def model(x: Tensor, t: Tensor) -> Tensor:
        k = next(calls)
        alpha, sigma = sampler.levels[k].tolist()
        middle, half = 2 * columns["log_scale"][k], 2 * columns["log_scale_slope"][k]
        of_x0 = columns["x0"][k]
        uncertain = 1 / (alpha**2 / sigma**2 + 1 / deviation**2)
        true = ((middle - half).exp() + of_x0**2 * uncertain).log()
        place = (true - middle) / half if half else torch.zeros(())
        # The data is within what the network can say: v from -1 to 1.
        assert -1 <= place <= 1 + 1e-9
        return torch.cat((predict(x, t), place.expand(x.shape)), 1)

    still, maps = affine_maps(sampler, model)
    alpha, sigma = sampler.levels[0].tolist()
    spread = math.sqrt(alpha**2 * deviation**2 + sigma**2)
    of_start, of_noise = maps[:, 0] * spread / sampler.initial_scale, maps[:, 1:]
    covariances = of_start @ of_start.mT + (of_noise @ of_noise.mT).sum(1)
    true_means, true_covariances = marginals(sampler, **data)
    assert (covariances - true_covariances)[:-1].abs().max() < 1e-10
    assert (still + maps[:, 0] @ (alpha * MEAN) / sampler.initial_scale - true_means).abs().max() < 1e-10


@pytest.mark.parametrize("predicts", PARAMETERIZATIONS)
@pytest.mark.parametrize(
    "make",
    [diffusion.ddpm, diffusion.ddim, diffusion.euler, diffusion.euler_ancestral, diffusion.heun, diffusion.dpm_solver],
    ids=lambda make: make.__name__,
)
def test_every_parameterization_says_the_same(make, predicts):
    want = moments(make(diffusion.linear(), 12, parameterization="x0"))
    got = moments(make(diffusion.linear(), 12, parameterization=predicts))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


# --- Convergence, with the theoretical order. The grids are finer versions of one smooth grid.


def edm(steps: int) -> tuple[Schedule, dict[str, Any]]:
    """Levels of EDM, for data that is not scaled."""
    return diffusion.karras(steps, 0.05, 20.0), {}


def preserving(steps: int) -> tuple[Schedule, dict[str, Any]]:
    """Such levels between the steps of a variance-preserving schedule."""
    return diffusion.linear(), {"steps": steps, "spacing": "karras"}


@pytest.mark.parametrize("path", [edm, preserving], ids=lambda path: path.__name__)
@pytest.mark.parametrize(
    ("make", "options", "theory"),
    [
        (diffusion.euler, {}, 1),
        (diffusion.ddim, {}, 1),
        (diffusion.ddim, {"eta": 0.5}, 1),
        (diffusion.ddpm, {}, 1),
        (diffusion.ddpm, {"variance": "fixed_large"}, 1),
        (diffusion.euler_ancestral, {}, 1),
        (diffusion.dpm_solver, {"order": 1}, 1),
        (diffusion.dpm_solver, {}, 2),
        (diffusion.dpm_solver, {"sde": True}, 2),
        (diffusion.heun, {}, 2),
        (diffusion.heun, {"s_churn": 4.0}, 2),
        (diffusion.heun, {"s_churn": 4.0, "s_tmin": 0.2, "s_tmax": 5.0}, 2),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_order_of_convergence(path, make, options, theory):
    def at(steps: int) -> Sampler:
        schedule, grid = path(steps)
        return make(schedule, parameterization="v", **grid, **options)

    # From the data's noised distribution to the last level of noise: neither end has an error of its own.
    found = order(at, 150, at=-2, exact_start=True)
    # The next term of the error changes log2 of the ratio by its relative size, here up to a tenth.
    assert abs(found - theory) < 0.15


@pytest.mark.parametrize(("make", "theory"), [(diffusion.flow_euler, 1), (diffusion.heun, 2)], ids=["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence_from_pure_noise_to_data(make, theory, shift):
    """A straight path begins at noise alone, so that there is no error but the sampler's."""
    found = order(lambda steps: make(diffusion.flow(steps, shift), parameterization="velocity"), 100)
    assert abs(found - theory) < 0.15


@pytest.mark.parametrize(
    ("sampler", "bound"),
    [
        (diffusion.ddpm(diffusion.linear()), 0.02),
        (diffusion.ddpm(diffusion.linear(), variance="fixed_large"), 0.02),
        (diffusion.ddim(diffusion.linear()), 0.02),
        (diffusion.ddim(diffusion.linear(), 50), 0.1),
        (diffusion.euler_ancestral(diffusion.linear()), 0.02),
        (diffusion.dpm_solver(diffusion.linear(), 50), 0.02),
        (diffusion.dpm_solver(diffusion.linear(), 50, sde=True), 0.1),
        (diffusion.dpm_solver(diffusion.linear(), 50, spacing="karras"), 0.02),
        (diffusion.heun(diffusion.karras(80)), 0.02),
        (diffusion.heun(diffusion.karras(80), s_churn=10, s_tmin=0.05, s_tmax=50), 0.02),
        (diffusion.heun(diffusion.flow(), 40, parameterization="velocity"), 0.02),
        (diffusion.flow_euler(diffusion.flow()), 0.02),
    ],
    ids=repr,
)
def test_from_noise_to_data(sampler, bound):
    """The samples that everybody draws, from noise alone to no noise: 2% (or 10%) of what the moments are, about 1."""
    assert error(sampler) < bound
