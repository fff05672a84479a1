"""The tables of the samplers: which steps, which noise, what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusion.peers import SHAPE, model

from gencore import Key, diffusion, ops
from gencore.diffusion import Schedule
from gencore.diffusion.levels import levels_at

MAKERS = (
    diffusion.ddpm,
    diffusion.ddim,
    diffusion.euler,
    diffusion.euler_ancestral,
    diffusion.heun,
    diffusion.dpm_solver,
)
each_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def column(sampler, name):
    return sampler.rows[:, ops.STEP_COLUMNS.index(name)]


def test_timesteps_of_the_paper():
    """Lin et al. (2024), table 2, counts from 1."""
    assert diffusion.timesteps(1000, 10, "leading", 1) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert diffusion.timesteps(1000, 10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert diffusion.timesteps(1000, 10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_timesteps_fall_within_the_schedule(spacing, total):
    for steps in {1, 2, 3, total // 2 or 1, total - 1 or 1, total}:
        if steps > total:
            continue
        chosen = diffusion.timesteps(total, steps, spacing)
        assert len(chosen) == steps
        assert 0 <= chosen[-1] <= chosen[0] < total
        assert all(later < earlier for earlier, later in pairwise(chosen))
        if spacing == "trailing":
            assert chosen[0] == total - 1
        else:
            assert chosen[-1] == 0
        if steps == total:
            assert chosen == list(reversed(range(total)))


@each_maker
def test_steps_may_be_named(make):
    schedule = diffusion.linear()
    want = make(schedule, 20, spacing="trailing")
    for named in (diffusion.timesteps(1000, 20), torch.tensor(diffusion.timesteps(1000, 20))):
        got = make(schedule, named)
        assert torch.equal(got.rows, want.rows)
        assert torch.equal(got.times, want.times)
        assert got.streams == want.streams
    assert len(make(schedule)) == (1999 if make is diffusion.heun else 1000)


@each_maker
def test_the_noise_of_a_step_is_known_by_its_number(make):
    """Whatever other steps are taken, leaving step t of the schedule adds the noise of stream 1 + t."""
    second = 1 << 31
    sampler = make(diffusion.linear(), [900, 500, 20])
    corrected = (901, second + 901, 501, second + 501, 21)
    assert sampler.streams == (corrected if make is diffusion.heun else (901, 501, 21))
    between = make(diffusion.linear(), 3, spacing="karras")
    assert between.streams == ((1, second + 1, 2, second + 2, 3) if make is diffusion.heun else (1, 2, 3))


@each_maker
def test_levels(make):
    schedule = diffusion.linear()
    sampler = make(schedule, [900, 500, 20], parameterization="v")
    levels = sampler.levels.tolist()
    at = [(schedule.alpha[t].item(), schedule.sigma[t].item()) for t in (900, 500, 20)]
    if make is diffusion.heun:
        assert sampler.times.tolist() == [900, 500, 500, 20, 20]
        at = [at[0], at[1], at[1], at[2], at[2]]
    assert [tuple(level) for level in levels] == [*at, (1.0, 0.0)]
    # What is known gets the noise of the level that the step leads to.
    assert torch.equal(column(sampler, "known"), sampler.levels[1:, 0])
    assert torch.equal(column(sampler, "known_noise"), sampler.levels[1:, 1])
    assert sampler.initial_scale == 1.0
    assert column(sampler, "noise")[-1] == 0


def test_the_first_noise():
    assert diffusion.euler(diffusion.karras(), parameterization="x0").initial_scale == 80.0
    assert diffusion.euler(diffusion.flow(), parameterization="v").initial_scale == 1.0
    # Churn of the first step is part of it: variances add up.
    churned = diffusion.heun(diffusion.karras(), parameterization="x0", s_churn=1e9, s_noise=1.1)
    assert churned.initial_scale == pytest.approx(math.hypot(80, 1.1 * 80), rel=1e-12)
    preserving = diffusion.heun(diffusion.linear(), 20, s_churn=1e9)
    assert preserving.initial_scale == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("schedule", [diffusion.karras(9), diffusion.linear(99), diffusion.flow(9)], ids=repr)
def test_levels_between_lie_on_the_schedules_curve(schedule):
    for t in (1, 4):
        ratio = (schedule.sigma[t] / schedule.alpha[t]).item()
        level, between = levels_at(schedule, [ratio, 1.05 * ratio])
        want = (schedule.alpha[t].item(), schedule.sigma[t].item(), schedule.times[t].item())
        assert level == pytest.approx(want, rel=1e-12)
        assert between.ratio == pytest.approx(1.05 * ratio, rel=1e-12)
        assert schedule.times[t] < between.time < schedule.times[t + 1]
    own = Schedule([0.5, 0.4, 0.2], [0.5, 0.6, 0.9])
    ratio = math.sqrt(1.0 * 1.5)
    assert levels_at(own, [ratio])[0] == pytest.approx((math.sqrt(0.2), ratio * math.sqrt(0.2), 0.5), rel=1e-12)


def test_one_step_of_every_kind():
    """The columns against the formulas of the papers, worked out for one step from t = 900 to t = 500."""
    schedule = diffusion.linear()
    a, s = schedule.alpha[900].item(), schedule.sigma[900].item()
    b, r = schedule.alpha[500].item(), schedule.sigma[500].item()

    def first(sampler):
        values = dict(zip(ops.STEP_COLUMNS, sampler.rows[0].tolist(), strict=True))
        return {name: values[name] for name in ("predict_x", "predict_output", "x", "direct", "x0", "noise")}

    steps = [900, 500]
    # Ho et al. (2020), equations 7 and 15, with beta = 1 - alpha_bar / alpha_bar'.
    beta = 1 - a * a / (b * b)
    posterior = {"x": math.sqrt(1 - beta) * r * r / (s * s), "x0": b * beta / (s * s), "direct": 0.0}
    predict = {"predict_x": 1 / a, "predict_output": -s / a}
    small = math.sqrt(r * r / (s * s) * beta)
    assert first(diffusion.ddpm(schedule, steps)) == pytest.approx({**predict, **posterior, "noise": small})
    large = first(diffusion.ddpm(schedule, steps, variance="fixed_large"))
    assert large == pytest.approx({**predict, **posterior, "noise": math.sqrt(beta)})
    assert first(diffusion.ddim(schedule, steps, eta=1.0))["noise"] == pytest.approx(small)
    # Song et al. (2021), equation 12, with eps said by the network itself.
    direction = {"x": 0.0, "direct": r, "x0": b, "noise": 0.0}
    assert first(diffusion.ddim(schedule, steps)) == pytest.approx({**predict, **direction})
    # Lu et al. (2022), equation 9 of DPM-Solver++.
    h = math.log(b / r) - math.log(a / s)
    solver = {"x": r / s, "x0": -b * math.expm1(-h), "direct": 0.0, "noise": 0.0}
    assert first(diffusion.dpm_solver(schedule, steps)) == pytest.approx({**predict, **solver})
    assert first(diffusion.euler(schedule, steps)) == pytest.approx({**predict, **solver})


def test_heun_is_algorithm_2_of_edm():
    """With churn, over all of a trajectory, written down as the paper has it; s_tmax leaves the first step out."""
    steps, s_churn, s_tmin, s_tmax, s_noise = 12, 6.0, 0.05, 50.0, 1.007
    schedule = diffusion.karras(steps)
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    sampler = diffusion.heun(schedule, parameterization="x0", **options)
    key = Key(11)
    ours = diffusion.sample(model, SHAPE, sampler, key, dtype=torch.float64)

    def denoise(x, sigma):
        # The network is told the time in float32.
        return model(x, torch.full((len(x),), sigma, dtype=torch.float32))

    def noise(stream):
        return ops.normal(SHAPE, key.stream(stream), dtype=torch.float64)

    t = [*schedule.sigma.flip(0).tolist(), 0.0]
    x = t[0] * noise(0)
    churned = 0
    for i in range(steps):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        # Our kernels add this noise at the end of the step before, from step number `steps - i` of the schedule.
        if gamma:
            churned += 1
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noise((1 << 31) + 1 + steps - i)
        d = (x - denoise(x, t_hat)) / t_hat
        following = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_following = (following - denoise(following, t[i + 1])) / t[i + 1]
            following = x + (t[i + 1] - t_hat) * (d / 2 + d_following / 2)
        x = following
    assert 3 < churned < steps
    # Some hundred operations in float64 on values that begin at 80 times the size of the last ones.
    assert (ours - x).abs().max() < 1e-11


@pytest.mark.parametrize("schedule", [diffusion.flow(40), diffusion.zero_terminal_snr(diffusion.linear(40))], ids=repr)
@each_maker
def test_from_pure_noise(make, schedule):
    """alpha = 0: the network must say something of the data there, and then every coefficient is finite."""
    for parameterization in ("x0", "v", "velocity"):
        if make is diffusion.heun and schedule.is_variance_preserving:
            with pytest.raises(ValueError, match=r"schedule must begin with some signal \(alpha > 0\) for heun"):
                make(schedule, parameterization=parameterization)
            continue
        sampler = make(schedule, parameterization=parameterization)
        rows = torch.cat((sampler.rows[:, :4], sampler.rows[:, 5:]), 1)  # all but the limit
        assert rows.isfinite().all()
        assert sampler.initial_scale == 1.0
    kinds = (
        "some signal" if make is diffusion.heun and schedule.is_variance_preserving else "parameterization must be v"
    )
    with pytest.raises(ValueError, match=kinds):
        make(schedule, parameterization="eps")
    with pytest.raises(ValueError, match="spacing must not be karras for a schedule that ends without signal"):
        make(schedule, 10, parameterization="v", spacing="karras")


def test_learned_variance():
    sampler = diffusion.ddpm(diffusion.linear(), 20, variance="learned_range")
    small = diffusion.ddpm(diffusion.linear(), 20)
    large = diffusion.ddpm(diffusion.linear(), 20, variance="fixed_large")
    assert sampler.learned_variance
    assert not small.learned_variance
    for v, fixed in ((-1, small), (1, large)):
        deviation = (
            column(sampler, "noise") * (column(sampler, "log_scale") + v * column(sampler, "log_scale_slope")).exp()
        )
        torch.testing.assert_close(deviation, column(fixed, "noise"), rtol=1e-12, atol=0)


def test_a_sampler_is_immutable():
    sampler = diffusion.ddim(diffusion.linear(), 5)
    with pytest.raises(AttributeError):
        sampler.rows = None
    assert repr(sampler) == "<ddim: 5 calls, predicting eps, at times from 999 to 199>"
    assert len(sampler) == 5


@each_maker
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": 3}, TypeError, "schedule must be a Schedule, got int"),
        ({"steps": 0}, ValueError, "steps must be between 1 and the schedule's 1000, got 0"),
        ({"steps": 1001}, ValueError, "steps must be between 1 and the schedule's 1000, got 1001"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
        ({"steps": 2.5}, TypeError, "steps must be an int, or ints that number the schedule's steps, got 2.5"),
        ({"steps": []}, TypeError, "steps must be an int, or ints"),
        ({"steps": [3, 2.0]}, TypeError, "every one of steps must be an int, got float"),
        ({"steps": [1000, 2]}, ValueError, "every one of steps must be between 0 and 999, got 1000"),
        ({"steps": [3, 3]}, ValueError, "steps must fall, from the most noise to the least"),
        ({"spacing": "middle"}, ValueError, "spacing must be one of leading, trailing, linspace, karras, got 'middle'"),
        ({"steps_offset": 1}, ValueError, "steps_offset must be 0 for a spacing other than leading, got 1"),
        ({"steps_offset": 20, "spacing": "leading"}, ValueError, None),
        ({"steps_offset": 1.0}, TypeError, "steps_offset must be an int, got float"),
        ({"clip": 0.0}, ValueError, "clip must be a positive number or None, got 0.0"),
        ({"clip": math.nan}, ValueError, "clip must be a positive number or None, got nan"),
        (
            {"parameterization": "noise"},
            ValueError,
            "parameterization must be one of eps, x0, v, velocity, got",
        ),
        ({"clip": "a"}, TypeError, "clip must be a number, got str"),
        ({"spacing": "karras", "steps": 0}, ValueError, "steps must be at least 1, got 0"),
        (
            {"spacing": "karras", "steps_offset": 5},
            ValueError,
            "steps_offset must be 0 for a spacing other than leading, got 5",
        ),
        (
            {"spacing": "karras", "steps": [900, 500, 10]},
            ValueError,
            "spacing must be left out where steps names the steps to take, got 'karras'",
        ),
        ({"steps": [900, 10], "steps_offset": 7}, ValueError, "steps_offset must be 0 for named steps, got 7"),
        ({"steps": None, "steps_offset": 7}, ValueError, "steps_offset must be 0 for all steps, got 7"),
        ({"steps": None, "steps_offset": "x"}, TypeError, "steps_offset must be an int, got str"),
    ],
    ids=repr,
)
def test_bad_arguments(make, options, error, message):
    options = {"schedule": diffusion.linear(), "steps": 50, **options}
    if message is None:
        # One step more and without its first, DPM-Solver's steps go less far.
        options["steps_offset"] = 60
        message = "steps_offset must leave all steps between 0 and 999, got 60"
    with pytest.raises(error, match=message):
        make(options.pop("schedule"), options.pop("steps"), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda s: diffusion.ddpm(s, variance="learned"),
            "variance must be one of fixed_small, fixed_large, lear",
        ),
        (lambda s: diffusion.ddim(s, eta=1.5), "eta must be from 0 to 1, got 1.5"),
        (lambda s: diffusion.euler_ancestral(s, eta=-1.0), "eta must be from 0 to 1, got -1.0"),
        (lambda s: diffusion.dpm_solver(s, order=3), "order must be 1 or 2, got 3"),
        (
            lambda s: diffusion.dpm_solver(s, final_zero=False),
            "final_zero must be True for steps that end with",
        ),
        (lambda s: diffusion.heun(s, s_churn=-1.0), "s_churn must be at least 0 and finite, got -1.0"),
        (lambda s: diffusion.heun(s, s_noise=math.nan), "s_noise must be at least 0 and finite, got nan"),
        (lambda s: diffusion.heun(s, s_noise=math.inf), "s_noise must be at least 0 and finite, got inf"),
        (lambda s: diffusion.heun(s, s_tmax=-1), "s_tmax must be at least 0, got -1"),
        (
            lambda s: diffusion.flow_euler(s),
            "schedule must be a straight path, alpha .* = 1, for flow_euler",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(diffusion.linear())


def test_options_that_are_no_numbers():
    for make, name in (
        (diffusion.ddim, "eta"),
        (diffusion.euler_ancestral, "eta"),
        (diffusion.heun, "s_churn"),
        (diffusion.heun, "s_tmin"),
        (diffusion.heun, "s_tmax"),
        (diffusion.heun, "s_noise"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            make(diffusion.linear(), **{name: "a"})
