"""Samplers that solve the differential equation: Euler, Heun, DPM-Solver++ and Euler on straight paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from gencore.diffusion.levels import CLEAN, Grid, Level, grid, is_flow, levels_at
from gencore.diffusion.sampler import Call, Sampler, assemble, check_number, move, remaining, scale_of_noise
from gencore.schedule import Parameterization, Schedule

Order = Literal[1, 2]

# What the streams of Heun's corrections begin after, beyond those of any schedule's steps.
_CORRECTION = 1 << 31


def euler(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    parameterization: Parameterization = "eps",
    spacing: Grid = "trailing",
    steps_offset: int = 0,
    clip: float | None = None,
) -> Sampler:
    """Euler's method for the probability flow: dx/ds = (x - x0) / s in x / alpha and s = sigma / alpha.

    x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) x0, which is DDIM with eta = 0, and on a straight path
    Euler's method along it.

    Args:
        spacing: which steps of the schedule, as in :func:`timesteps`; or ``"karras"``, levels between them that
            equation 5 of Karras et al. (2022) gives from the schedule's last to its first, at times between its own.
        schedule, steps, parameterization, steps_offset, clip: as in :func:`gencore.diffusion.ddpm`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    Source: Karras et al. (2022), Algorithm 1 without its correction; Song et al., DDIM (2021a), equation 13.
    """
    levels, streams = grid(schedule, steps, spacing, steps_offset)
    return assemble("euler", _euler_calls(levels, streams), parameterization, clip)


def flow_euler(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    parameterization: Parameterization = "velocity",
    spacing: Grid = "trailing",
    clip: float | None = None,
) -> Sampler:
    """Euler's method along a straight path: x' = x + (s' - s) velocity, velocity = eps - x0.

    Args:
        schedule: one with alpha + sigma = 1, such as :func:`flow`.
        steps, parameterization, spacing, clip: as in :func:`euler`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    Source: Liu et al. (2023), section 2.1; Lipman et al. (2023).
    """
    levels, streams = grid(schedule, steps, spacing, 0)
    if not is_flow(schedule):
        raise ValueError("schedule must be a straight path, alpha + sigma = 1, for flow_euler; euler serves any other")
    return assemble("flow_euler", _euler_calls(levels, streams), parameterization, clip)


def heun(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    parameterization: Parameterization = "eps",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    spacing: Grid = "trailing",
    steps_offset: int = 0,
    clip: float | None = None,
) -> Sampler:
    """Heun's method of EDM, of second order with two calls per step but the last, and with churn.

    Euler's step to x' is corrected by the prediction x0' there: x' + alpha' (s - s') / (2 s') (x0' - x0), in
    s = sigma / alpha. Straight paths, alpha + sigma = 1, are followed in sigma instead, so that they may begin at pure
    noise: x' + (sigma - sigma') / (2 sigma') (x0' - x0).

    Before a step with s_tmin <= s <= s_tmax, churn raises s to (1 + min(s_churn / N, sqrt(2) - 1)) s with noise of
    deviation s_noise. The kernel that ends the step before adds it; for the first step it is part of the initial noise.

    The noise of a call at step t of the schedule has the stream 1 + t, as for any sampler; that of the call which
    corrects this step, where the churn of the next is added, 2^31 + 1 + t.

    On a schedule that ends in almost nothing but noise (cosine) take ``"karras"`` or ``"leading"``: from the very last
    step, the first correction multiplies what differs between two predictions by 10 for 50 steps, by 60 for 20.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: as in the paper, at least 0, in units of sigma / alpha; only s_tmax may be
            infinite.
        schedule, steps, parameterization, spacing, steps_offset, clip: as in :func:`euler`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    Source: Karras et al. (2022), Algorithm 2.
    """
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_tmax", s_tmax), ("s_noise", s_noise)):
        check_number(name, value)
        if not (0 <= value < math.inf or (name == "s_tmax" and value >= 0)):
            raise ValueError(f"{name} must be at least 0{'' if name == 's_tmax' else ' and finite'}, got {value}")
    levels, streams = grid(schedule, steps, spacing, steps_offset)
    flows = is_flow(schedule)
    if levels[0].alpha == 0 and not flows:
        raise ValueError("schedule must begin with some signal (alpha > 0) for heun, or be a straight path")
    gamma = min(s_churn / len(levels), math.sqrt(2) - 1)

    starts = [*levels, CLEAN]
    churned = [i for i, level in enumerate(levels) if gamma and level.alpha and s_tmin <= level.ratio <= s_tmax]
    for i, start in zip(churned, levels_at(schedule, [levels[i].ratio * (1 + gamma) for i in churned]), strict=True):
        starts[i] = start
    calls: list[Call] = []
    for stream, start, level, following in zip(streams, starts, [*levels[1:], CLEAN], starts[1:], strict=False):
        step = move(start, level)
        calls.append(Call(start, level, stream, {"x": step.of_x, "x0": step.of_x0}))
        if level.sigma == 0:
            break
        # x is alpha times what the method steps in; on a straight path it is that itself.
        unit, place, target = (1.0, start.sigma, level.sigma) if flows else (level.alpha, start.ratio, level.ratio)
        correction = unit * (place - target) / (2 * target)
        scale, noise = _raise(level, following, s_noise)
        columns = {"x": scale, "x0": scale * correction, "history0": -scale * correction, "noise": noise}
        calls.append(Call(level, following, _CORRECTION + stream, columns))
    scale, noise = _raise(levels[0], starts[0], s_noise)
    initial = math.hypot(scale * scale_of_noise(levels[0]), noise)
    return assemble("heun", calls, parameterization, clip, initial_scale=initial)


def dpm_solver(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    order: Order = 2,
    sde: bool = False,
    parameterization: Parameterization = "eps",
    lower_order_final: bool = True,
    final_zero: bool = True,
    spacing: Grid = "trailing",
    steps_offset: int = 0,
    clip: float | None = None,
) -> Sampler:
    """DPM-Solver++, multistep: each step uses the prediction of the one before, with one call per step.

    With lambda = log(alpha / sigma), h its difference over this step, h_0 over the one before:

        D = x0 + h / (2 h_0) (x0 - x0 of the call before)                     (order 1 and first step: D = x0)
        x' = (sigma' / sigma) x + alpha' (1 - e^-h) D                         (2M)
        x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) z     (SDE, 2M)

    Args:
        order: 2, or 1, which is DDIM with eta = 0, or 1 if ``sde``.
        sde: the solver of the stochastic equation.
        final_zero: go from the last level to no noise, where h is infinite; or else to the schedule's first step.
        lower_order_final: where the last step goes to the schedule's first, and there are less than 15 steps, make it
            of order 1, which is more stable. To no noise it always is.
        spacing: as in :func:`euler`; leading and linspace are those of one step more without the last.
        schedule, steps, parameterization, steps_offset, clip: as in :func:`euler`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    Source: Lu et al. (2022), "DPM-Solver++", Algorithm 2, and appendix B for the SDE; "midpoint" in their code.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    levels, streams = grid(schedule, steps, spacing, steps_offset, drop_first=True)
    final = CLEAN
    if not final_zero:
        final = Level(*(values[0].item() for values in (schedule.alpha, schedule.sigma, schedule.times)))
        if final.ratio >= levels[-1].ratio:
            raise ValueError("final_zero must be True for steps that end with the schedule's first, got False")
    first_order_last = final_zero or (lower_order_final and len(levels) < 15)
    calls: list[Call] = []
    h_before = math.inf
    for k, (before, after) in enumerate(pairwise([*levels, final])):
        step = move(before, after, eta=1.0 if sde else 0.0)
        left = remaining(before, after)
        h = -math.log(left) if left else math.inf
        extrapolated = 0.0
        if order == 2 and k > 0 and not (first_order_last and k == len(levels) - 1):
            # From pure noise h_0 is infinite, and the prediction there says nothing of how x0 changes.
            extrapolated = step.of_x0 * h / (2 * h_before)
        columns = {"x": step.of_x, "x0": step.of_x0 + extrapolated, "history0": -extrapolated, "noise": step.noise}
        calls.append(Call(before, after, streams[k], columns))
        h_before = h
    name = f"dpm_solver{'_sde' if sde else ''}_{order}"
    return assemble(name, calls, parameterization, clip)


def _euler_calls(levels: list[Level], streams: list[int]) -> list[Call]:
    calls = []
    for stream, (before, after) in zip(streams, pairwise([*levels, CLEAN]), strict=True):
        step = move(before, after)
        calls.append(Call(before, after, stream, {"x": step.of_x, "x0": step.of_x0}))
    return calls


def _raise(level: Level, churned: Level, s_noise: float) -> tuple[float, float]:
    """What takes x to a level of more noise: scale x + noise z, sqrt(s_hat^2 - s^2) S_noise of Algorithm 2."""
    if churned == level:
        return 1.0, 0.0
    noise = churned.alpha * math.sqrt(churned.ratio**2 - level.ratio**2) * s_noise
    return churned.alpha / level.alpha, noise
