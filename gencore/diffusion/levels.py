"""At which noise levels a sampler calls the network: steps of the schedule, or levels between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from gencore._torch import on_cpu
from gencore.arguments import as_int, integer
from gencore.diffusion.schedules import karras_levels
from gencore.schedule import Schedule

Spacing = Literal["leading", "trailing", "linspace"]
Grid = Literal[Spacing, "karras"]


class Level(NamedTuple):
    """x = alpha x0 + sigma eps, and what the network is told there."""

    alpha: float
    sigma: float
    time: float

    @property
    def ratio(self) -> float:
        """The noise relative to the signal: sigma of EDM, whatever the schedule scales the data with."""
        return self.sigma / self.alpha if self.alpha else math.inf


CLEAN = Level(1.0, 0.0, 0.0)


def timesteps(schedule_steps: int, steps: int, spacing: Spacing = "trailing", steps_offset: int = 0) -> list[int]:
    """Which ``steps`` of a schedule's steps to take, from the most noise to the least (Lin et al. 2024, table 2).

    - ``"trailing"``: from the last one down, with equal steps: round(T - k T / n) - 1;
    - ``"leading"``: from ``steps_offset`` up, with whole steps: k (T div n) + offset. The last ones are left out;
    - ``"linspace"``: from the first to the last: round(k (T - 1) / (n - 1)).

    Any other choice, or a part of one to begin from an image instead of noise, is a list of one's own.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``steps`` is not between 1 and ``schedule_steps``.

    >>> timesteps(1000, 4), timesteps(1000, 4, "leading", 1), timesteps(1000, 4, "linspace")
    ([999, 749, 499, 249], [751, 501, 251, 1], [999, 666, 333, 0])
    """
    steps = _count(steps, schedule_steps)
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing must be one of {', '.join(get_args(Spacing))}, got {spacing!r}")
    steps_offset = integer("steps_offset", steps_offset)
    if steps_offset and spacing != "leading":
        raise ValueError(f"steps_offset must be 0 for a spacing other than leading, got {steps_offset}")
    if spacing == "leading":
        chosen = [k * (schedule_steps // steps) + steps_offset for k in range(steps)]
    elif spacing == "trailing":
        # NumPy's rounding is to even, as Python's is.
        chosen = [round(schedule_steps - k * (schedule_steps / steps)) - 1 for k in reversed(range(steps))]
    else:
        chosen = [round(at) for at in np.linspace(0, schedule_steps - 1, steps).tolist()]
    if chosen[0] < 0 or chosen[-1] >= schedule_steps:
        raise ValueError(
            f"steps_offset must leave all steps between 0 and {schedule_steps - 1}, got {steps_offset}, which gives "
            f"{chosen[0]} to {chosen[-1]}"
        )
    return chosen[::-1]


@on_cpu
def grid(
    schedule: Schedule, steps: int | Sequence[int] | None, spacing: Grid, steps_offset: int, *, drop_first: bool = False
) -> tuple[list[Level], list[int]]:
    """The levels of a sampler's calls, from the most noise to the least, and the stream of the noise of each.

    Where a step of the schedule stands, the stream is 1 + its number, whatever other steps are taken; between steps
    (karras), 1 + how many levels came before. Stream 0 is the initial noise.

    Args:
        spacing, steps_offset: refused where they would have no effect, as beside named steps.
        drop_first: take one step more, and leave out the schedule's first, from where there is little way to go
            (DPM-Solver); not for trailing spacing, which does not end there.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
    if spacing not in get_args(Grid):
        raise ValueError(f"spacing must be one of {', '.join(get_args(Grid))}, got {spacing!r}")
    steps_offset = integer("steps_offset", steps_offset)
    total, counted = len(schedule), steps is None or isinstance(steps, bool) or as_int(steps) is not None
    if not counted and spacing != "trailing":
        raise ValueError(f"spacing must be left out where steps names the steps to take, got {spacing!r}")
    if steps_offset and (steps is None or not counted or spacing != "leading"):
        what = "all steps" if steps is None else "named steps" if not counted else "a spacing other than leading"
        raise ValueError(f"steps_offset must be 0 for {what}, got {steps_offset}")
    if spacing == "karras":
        count = total if steps is None else _count(steps, None)
        return _between(schedule, count), list(range(1, count + 1))
    if steps is None:
        chosen = list(reversed(range(total)))
    elif counted:
        count = _count(steps, total)
        if drop_first and spacing in ("leading", "linspace") and count < total:
            chosen = timesteps(total, count + 1, spacing, steps_offset)[:-1]
        else:
            chosen = timesteps(total, count, spacing, steps_offset)
    else:
        chosen = _checked(steps, total)
    tables = zip(schedule.alpha.tolist(), schedule.sigma.tolist(), schedule.times.tolist(), strict=True)
    levels = [Level(*values) for values in tables]
    return [levels[t] for t in chosen], [1 + t for t in chosen]


def is_flow(schedule: Schedule) -> bool:
    """Whether the path from data to noise is straight: alpha + sigma = 1."""
    return bool(((schedule.alpha + schedule.sigma - 1).abs() < 1e-9).all())


def levels_at(schedule: Schedule, ratios: Sequence[float]) -> list[Level]:
    """The levels with ``sigma / alpha`` of these values on the curve that the schedule's steps lie on.

    The curve is known for alpha = 1, alpha^2 + sigma^2 = 1 and alpha + sigma = 1; for another one log alpha is
    interpolated. So is the time, over log(sigma / alpha), unless it is proportional to sigma.
    """
    present = schedule.alpha > 0
    alpha, sigma, times = (values[present].numpy() for values in (schedule.alpha, schedule.sigma, schedule.times))
    at = np.asarray(ratios, dtype=np.float64)
    if (alpha == 1).all():
        scale = np.ones_like(at)
    elif schedule.is_variance_preserving:
        scale = 1 / np.hypot(1, at)
    elif is_flow(schedule):
        scale = 1 / (1 + at)
    else:
        scale = np.exp(np.interp(np.log(at), np.log(sigma / alpha), np.log(alpha)))
    factor = times / sigma
    if (abs(factor - factor[0]) <= 1e-12 * abs(factor[0])).all():
        time = factor[0] * at * scale
    else:
        time = np.interp(np.log(at), np.log(sigma / alpha), times)
    return [Level(*values) for values in zip(scale.tolist(), (at * scale).tolist(), time.tolist(), strict=True)]


def _between(schedule: Schedule, count: int) -> list[Level]:
    """Levels that Karras et al. (2022) would take from the schedule's last to its first."""
    if schedule.alpha[-1] == 0:
        raise ValueError(
            "spacing must not be karras for a schedule that ends without signal: its sigma / alpha is infinite"
        )
    ratios = (schedule.sigma / schedule.alpha).tolist()
    return levels_at(schedule, karras_levels(count, ratios[0], ratios[-1]))


def _count(steps: object, most: int | None) -> int:
    count = integer("steps", steps)
    if count < 1 or (most is not None and count > most):
        bounds = "at least 1" if most is None else f"between 1 and the schedule's {most}"
        raise ValueError(f"steps must be {bounds}, got {count}")
    return count


def _checked(steps: object, total: int) -> list[int]:
    if isinstance(steps, (torch.Tensor, np.ndarray)):
        steps = steps.tolist()
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not len(steps):
        raise TypeError(f"steps must be an int, or ints that number the schedule's steps, got {steps!r}")
    chosen = [integer("every one of steps", step) for step in steps]
    for step in chosen:
        if not 0 <= step < total:
            raise ValueError(f"every one of steps must be between 0 and {total - 1}, got {step}")
    if any(later >= earlier for earlier, later in pairwise(chosen)):
        raise ValueError(f"steps must fall, from the most noise to the least, got {chosen}")
    return chosen
