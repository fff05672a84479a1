"""What a sampler is: for every call of the network, where it is called and what is done with its output."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gencore import ops
from gencore._torch import on_cpu
from gencore.diffusion.levels import Level
from gencore.schedule import Parameterization, prediction


@dataclass(frozen=True, eq=False, repr=False)
class Sampler:
    """Tables that say what :func:`gencore.diffusion.sample` does. Immutable; functions such as ``ddpm`` make them.

    A sampler may be used for any number of runs, with any model of its parameterization, on any device.
    """

    name: str
    parameterization: Parameterization
    times: Tensor
    """(N,) float64: what the network is told at each of its N calls."""
    rows: Tensor
    """(N, 16) float64: the coefficients of :func:`gencore.ops.diffusion_step` after each call."""
    levels: Tensor
    """(N + 1, 2) float64: alpha and sigma before each call, and after the last one."""
    streams: tuple[int, ...]
    """The stream of the noise that is added after each call; 0 is that of the initial noise."""
    initial_scale: float
    """The standard deviation that sampling begins with."""
    learned_variance: bool = False
    """Whether the network must say how large the noise is, in a second half of its channels."""

    def __len__(self) -> int:
        return len(self.times)

    def __repr__(self) -> str:
        ends = f"{self.times[0].item():g} to {self.times[-1].item():g}"
        return f"<{self.name}: {len(self)} calls, predicting {self.parameterization}, at times from {ends}>"

    @property
    def uses_history(self) -> tuple[bool, ...]:
        """Whether what follows each call takes the prediction of the call before it."""
        return tuple((self.rows[:, _HISTORY] != 0).tolist())


_HISTORY = ops.STEP_COLUMNS.index("history0")


class Move(NamedTuple):
    """x' = of_x x + of_x0 x0 + noise eps, from one level to another."""

    of_x: float
    of_x0: float
    noise: float


@dataclass(frozen=True)
class Call:
    """One call of the network at a level, and the columns of the step that follows it."""

    before: Level
    after: Level
    stream: int
    columns: dict[str, float]


def remaining(before: Level, after: Level) -> float:
    """(sigma' / alpha') / (sigma / alpha): the part of the noise that is left, DPM-Solver's exp(-h)."""
    return (after.sigma * before.alpha) / (after.alpha * before.sigma)


def move(before: Level, after: Level, eta: float = 0.0) -> Move:
    """The first order step of all samplers, from x = alpha x0 + sigma eps to alpha' x0 + k eps + n z.

    n = eta sigma' sqrt(1 - r^2) is new noise, k = sqrt(sigma'^2 - n^2) what stays of the old, r = ``remaining``. For
    eta = 0 that is DDIM, Euler's method in sigma / alpha, DPM-Solver-1 and, on a straight path, Euler's method along
    it; for eta = 1 the posterior q(x' | x, x0) of DDPM, and the ancestral step of k-diffusion.

    Source: Song et al., DDIM (2021a), equations 12 and 16, for any alpha and sigma.
    """
    r = remaining(before, after)
    noise = eta * after.sigma * math.sqrt(1 - r * r)
    stays = math.sqrt(max(after.sigma**2 - noise**2, 0.0)) if eta != 1 else after.sigma * r
    return Move(stays / before.sigma, after.alpha - before.alpha * stays / before.sigma, noise)


def noise_prediction(parameterization: Parameterization, level: Level) -> tuple[float, float]:
    """(a, b) with eps = a x + b output."""
    alpha, sigma = level.alpha, level.sigma
    if parameterization == "eps":
        return 0.0, 1.0
    if parameterization == "x0":
        return 1 / sigma, -alpha / sigma
    if parameterization == "v":
        square = alpha**2 + sigma**2
        return sigma / square, alpha / square
    return 1 / (alpha + sigma), alpha / (alpha + sigma)


@on_cpu
def assemble(
    name: str,
    calls: Sequence[Call],
    parameterization: Parameterization,
    clip: float | None,
    *,
    initial_scale: float | None = None,
    learned_variance: bool = False,
) -> Sampler:
    """The sampler of these calls, each of which begins where the one before it ended.

    Raises:
        TypeError: a clip that is no number.
        ValueError: a parameterization that is unknown, or says nothing about x0 at a level; a clip not positive.
    """
    if clip is not None:
        check_number("clip", clip)
        if not 0 < clip < math.inf:
            raise ValueError(f"clip must be a positive number or None, got {clip}")
    ends = [call.before for call in calls] + [calls[-1].after]
    levels = torch.tensor([(level.alpha, level.sigma) for level in ends], dtype=torch.float64)
    # x0 = a x + b output
    of_x, of_output = prediction(parameterization, *levels[:-1].unbind(1))
    names = sorted({name for call in calls for name in call.columns})
    defaults = dict(zip(ops.STEP_COLUMNS, ops.step_coefficients().tolist(), strict=True))
    columns = {name: [call.columns.get(name, defaults[name]) for call in calls] for name in names}
    rows = ops.step_coefficients(
        predict_x=of_x,
        predict_output=of_output,
        limit=math.inf if clip is None else clip,
        known=levels[1:, 0],
        known_noise=levels[1:, 1],
        **columns,
    )
    return Sampler(
        name=name,
        parameterization=parameterization,
        times=torch.tensor([call.before.time for call in calls], dtype=torch.float64),
        rows=rows,
        levels=levels,
        streams=tuple(call.stream for call in calls),
        initial_scale=scale_of_noise(ends[0]) if initial_scale is None else initial_scale,
        learned_variance=learned_variance,
    )


def scale_of_noise(level: Level) -> float:
    """The standard deviation to begin with: 1 where alpha^2 + sigma^2 = 1, as for data of variance 1, else sigma."""
    return 1.0 if abs(level.alpha**2 + level.sigma**2 - 1) < 1e-9 else level.sigma


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
