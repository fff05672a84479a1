"""Samplers that follow the chain back: DDPM, DDIM and the ancestral steps between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import get_args

from gencore.diffusion.levels import CLEAN, Grid, Level, grid
from gencore.diffusion.sampler import Call, Sampler, assemble, check_number, move, noise_prediction, remaining
from gencore.schedule import Parameterization, Schedule, Variance, check_parameterization


def ddpm(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    parameterization: Parameterization = "eps",
    variance: Variance = "fixed_small",
    spacing: Grid = "trailing",
    steps_offset: int = 0,
    clip: float | None = None,
) -> Sampler:
    """Ancestral sampling of DDPM, over all steps of the schedule or over a part of them.

    x' = mu + deviation z, mu = (sigma' / sigma) r x + alpha' (1 - r^2) x0, r = (sigma' / alpha') / (sigma / alpha).
    mu is the mean of the posterior q(x' | x, x0), for alpha^2 + sigma^2 = 1 equation 7 of the paper. The last step adds
    no noise.

    Args:
        schedule: the levels that the network was trained at.
        steps: how many of its steps to take; which (falling ints); or None for all.
        parameterization: what the network predicts.
        variance: ``"fixed_small"``, that of the posterior, beta~ = sigma'^2 (1 - r^2); ``"fixed_large"``, that of the
            chain, beta = sigma^2 (1 - r^2); ``"learned_range"``, between the logarithms of both, as the second half of
            the network's channels says (Nichol and Dhariwal 2021, equation 15).
        spacing, steps_offset: which steps; see :func:`timesteps`, and ``"karras"`` in :func:`euler`.
        clip: the largest absolute value of x0, such as 1 for images in [-1, 1]; by default none.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    >>> from gencore.diffusion import linear
    >>> ddpm(linear(), 50, clip=1.0)
    <ddpm: 50 calls, predicting eps, at times from 999 to 19>

    Source: Ho et al. (2020), Algorithm 2; Nichol and Dhariwal (2021), section 4, for a part of the steps.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"variance must be one of {', '.join(get_args(Variance))}, got {variance!r}")
    levels, streams = grid(schedule, steps, spacing, steps_offset)
    calls = []
    for stream, (before, after) in zip(streams, pairwise([*levels, CLEAN]), strict=True):
        step = move(before, after, eta=1.0)
        columns = {"x": step.of_x, "x0": step.of_x0, **_noise_of_variance(before, after, variance)}
        calls.append(Call(before, after, stream, columns))
    return assemble("ddpm", calls, parameterization, clip, learned_variance=variance == "learned_range")


def ddim(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    eta: float = 0.0,
    parameterization: Parameterization = "eps",
    spacing: Grid = "trailing",
    steps_offset: int = 0,
    clip: float | None = None,
    clip_noise: bool = False,
) -> Sampler:
    """DDIM: x' = alpha' x0 + sqrt(sigma'^2 - n^2) eps + n z, n = eta sigma' sqrt(1 - r^2).

    eta = 0 is deterministic, eta = 1 has the noise of DDPM. What is clipped is x0 alone, not the eps that the network
    said or that follows from its output.

    Args:
        eta: from 0 to 1.
        clip_noise: let eps be what follows from the clipped x0, which bears strong guidance better (diffusers'
            ``use_clipped_model_output``); the step is then that of :func:`euler_ancestral`.
        schedule, steps, parameterization, spacing, steps_offset, clip: as in :func:`ddpm`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    Source: Song et al., "Denoising Diffusion Implicit Models" (2021a), equations 12 and 16.
    """
    _check_eta(eta)
    check_parameterization(parameterization)
    levels, streams = grid(schedule, steps, spacing, steps_offset)
    calls = []
    for stream, (before, after) in zip(streams, pairwise([*levels, CLEAN]), strict=True):
        step = move(before, after, eta)
        if clip_noise:
            calls.append(Call(before, after, stream, {"x": step.of_x, "x0": step.of_x0, "noise": step.noise}))
            continue
        stays = step.of_x * before.sigma
        of_x, of_output = noise_prediction(parameterization, before)
        columns = {"x": stays * of_x, "direct": stays * of_output, "x0": after.alpha, "noise": step.noise}
        calls.append(Call(before, after, stream, columns))
    return assemble("ddim", calls, parameterization, clip)


def euler_ancestral(
    schedule: Schedule,
    steps: int | Sequence[int] | None = None,
    *,
    eta: float = 1.0,
    parameterization: Parameterization = "eps",
    spacing: Grid = "trailing",
    steps_offset: int = 0,
    clip: float | None = None,
) -> Sampler:
    """Euler's method down to sigma_down, then noise up to the next level, as k-diffusion has it.

    In s = sigma / alpha: s_up = eta s' sqrt(1 - s'^2 / s^2), s_down^2 = s'^2 - s_up^2, for any schedule. For eta = 1
    this is the posterior of DDPM with its own variance. Unlike in :func:`ddim`, a clipped x0 changes eps too.

    Args:
        eta: from 0, Euler's method, to 1.
        schedule, steps, parameterization, spacing, steps_offset, clip: as in :func:`ddpm`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says which.

    Source: k-diffusion's ``sample_euler_ancestral``; Song et al., DDIM (2021a), equation 16.
    """
    _check_eta(eta)
    levels, streams = grid(schedule, steps, spacing, steps_offset)
    calls = []
    for stream, (before, after) in zip(streams, pairwise([*levels, CLEAN]), strict=True):
        step = move(before, after, eta)
        calls.append(Call(before, after, stream, {"x": step.of_x, "x0": step.of_x0, "noise": step.noise}))
    return assemble("euler_ancestral", calls, parameterization, clip)


def _noise_of_variance(before: Level, after: Level, variance: Variance) -> dict[str, float]:
    if after.sigma == 0:
        return {"noise": 0.0}
    rest = math.sqrt(1 - remaining(before, after) ** 2)
    small, large = after.sigma * rest, before.sigma * rest
    if variance != "learned_range":
        return {"noise": small if variance == "fixed_small" else large}
    # The logarithm of the deviation is half that of the variance, and v goes from -1, the small one, to 1.
    low, high = math.log(small), math.log(large)
    return {"noise": 1.0, "log_scale": (low + high) / 2, "log_scale_slope": (high - low) / 2}


def _check_eta(eta: float) -> None:
    check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
