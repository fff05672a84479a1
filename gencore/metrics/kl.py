"""The Kullback-Leibler divergence of densities on a line, in closed form and by numbers, in both directions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

# Points of the quadrature, and how far it reaches beyond the mean, in standard deviations.
_POINTS, _REACH = 20_001, 12.0
_STEPS, _RATE = 600, 0.05


def kl_divergence(p: Distribution, q: Distribution, *, numeric: bool = False) -> float:
    """KL(p || q) = E_p[log p(x) - log q(x)] in nats, of two distributions of one real number.

    It is never negative, 0 only where p = q, and not symmetric: KL(p || q) is large where p has mass and q has none,
    KL(q || p) where q has mass and p has none.

    Args:
        p, q: of :mod:`torch.distributions`.
        numeric: by quadrature also where PyTorch knows the closed form. Without a closed form it is by quadrature
            anyway: Simpson's rule in float64 over 12 standard deviations to each side of the mean of p.

    Raises:
        TypeError: what are no distributions.
        ValueError: distributions of more than one number.
    """
    for name, each in (("p", p), ("q", q)):
        if not isinstance(each, Distribution):
            raise TypeError(f"{name} must be a torch.distributions.Distribution, got {type(each).__name__}")
        if each.batch_shape.numel() != 1 or each.event_shape.numel() != 1:
            raise ValueError(f"{name} must be of one number, got {each.batch_shape} and {each.event_shape}")
    if not numeric:
        try:
            return torch.distributions.kl_divergence(p, q).item()
        except NotImplementedError:
            pass
    points, weights = _quadrature(p)
    log_p = p.log_prob(points)
    # Where p has no mass, nothing is counted, whatever q has there: 0 log 0 = 0.
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - q.log_prob(points)))
    return (weights @ terms).item()


def nearest_normal(p: Distribution, direction: Literal["forward", "reverse"], start: float | None = None) -> Normal:
    """The normal distribution q with the least KL(p || q) (forward) or KL(q || p) (reverse).

    Forward, q must have mass wherever p has: it takes the mean and the variance of p, and so covers all modes (mean
    seeking). Reverse, q must have none where p has none: it settles on one mode (mode seeking), the nearest to
    ``start``; found by Adam on the quadrature of KL(q || p).

    Args:
        p: a distribution of one real number with finite variance.
        start: where the reverse one begins; left out, the mean of p.

    Raises:
        ValueError: another direction.

    Source: Minka, "Divergence measures and message passing" (2005), section 2; Bishop (2006), section 10.1.2.
    """
    mean, deviation = (value.double().reshape(()) for value in (p.mean, p.stddev))
    if direction == "forward":
        return Normal(mean, deviation)
    if direction != "reverse":
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    place = mean.clone() if start is None else torch.tensor(start, dtype=torch.float64)
    spread = (deviation / 4).log()
    place.requires_grad_()
    spread.requires_grad_()
    # The same places in units of q's deviation at every step, so that the gradient is that of the quadrature itself.
    units, weights = _quadrature(Normal(torch.zeros((), dtype=torch.float64), 1.0))
    density = weights * Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(units).exp()
    optimizer = torch.optim.Adam([place, spread], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            # KL(q || p) = -entropy(q) - E_q[log p], the entropy being log(deviation) and a constant.
            loss = -spread - density @ p.log_prob(place + spread.exp() * units)
            loss.backward()
            optimizer.step()
            schedule.step()
    return Normal(place.detach(), spread.detach().exp())


def _quadrature(p: Distribution) -> tuple[Tensor, Tensor]:
    """Points about the mean of p and Simpson's weights, in float64."""
    mean, deviation = float(p.mean), float(p.stddev)
    if not math.isfinite(mean) or not math.isfinite(deviation):
        raise ValueError(f"p must have a finite mean and variance, got {mean} and {deviation**2}")
    points = torch.linspace(mean - _REACH * deviation, mean + _REACH * deviation, _POINTS, dtype=torch.float64)
    weights = torch.full((_POINTS,), 2.0, dtype=torch.float64)
    weights[1::2] = 4
    weights[0] = weights[-1] = 1
    return points, weights * (points[1] - points[0]) / 3
