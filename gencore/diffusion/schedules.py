"""The schedules of the papers, in float64. Any other one is ``Schedule(alpha, sigma, times)``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencore._torch import on_cpu
from gencore.arguments import integer
from gencore.schedule import Schedule


@on_cpu
def linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas from ``beta_start`` to ``beta_end`` in equal steps (Ho et al. 2020, section 4).

    alpha_t^2 = prod_{s <= t} (1 - beta_s), sigma_t^2 = 1 - alpha_t^2.

    Raises:
        ValueError: ``steps`` is not at least 1, or the betas are not in (0, 1) or fall.
    """
    steps = integer("steps", steps, least=1)
    _check_betas(beta_start, beta_end)
    return _from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))


@on_cpu
def scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Betas whose square roots have equal steps, as latent diffusion trains with (Rombach et al. 2022).

    Raises:
        ValueError: as :func:`linear`.
    """
    steps = integer("steps", steps, least=1)
    _check_betas(beta_start, beta_end)
    return _from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square())


@on_cpu
def cosine(steps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alpha_t^2 = f(t + 1) / f(0), f(t) = cos^2((t / T + offset) / (1 + offset) pi / 2), no beta above ``max_beta``.

    Source: Nichol and Dhariwal (2021), equation 17.

    Raises:
        ValueError: ``steps`` is not at least 1, ``offset`` negative, or ``max_beta`` not in (0, 1).
    """
    steps = integer("steps", steps, least=1)
    if not 0 <= offset < math.inf:
        raise ValueError(f"offset must be at least 0, got {offset}")
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta must be in (0, 1), got {max_beta}")
    at = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = ((at + offset) / (1 + offset) * math.pi / 2).cos().square()
    return _from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


@on_cpu
def sigmoid(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta_t = beta_start + (beta_end - beta_start) / (1 + exp(-u_t)), u from -6 to 6 (Xu et al. 2022, GeoDiff).

    Raises:
        ValueError: as :func:`linear`.
    """
    steps = integer("steps", steps, least=1)
    _check_betas(beta_start, beta_end)
    place = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
    return _from_betas(place * (beta_end - beta_start) + beta_start)


@on_cpu
def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule shifted and scaled to end without signal, with the same first step.

    alpha_t' = (alpha_t - alpha_T) alpha_1 / (alpha_1 - alpha_T). A network that predicts the noise learns nothing at
    such a last step: predict v or x0.

    Raises:
        ValueError: the schedule is not variance-preserving, or has one step.

    Source: Lin et al. (2024), algorithm 1.
    """
    schedule.alphas_cumprod  # noqa: B018  refuses what is not variance-preserving
    if len(schedule) < 2:
        raise ValueError(f"schedule must have at least two steps, has {len(schedule)}")
    first, last = schedule.alpha[0], schedule.alpha[-1]
    alpha = (schedule.alpha - last) * (first / (first - last))
    return Schedule(alpha, (1 - alpha.square()).sqrt(), schedule.times)


@on_cpu
def karras(steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """Noise levels of EDM around data that is not scaled: alpha = 1, and the network is told sigma.

    sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, here from the least up.

    Raises:
        ValueError: ``steps`` is not at least 1, or not 0 < sigma_min < sigma_max, or ``rho`` not positive.

    Source: Karras et al. (2022), equation 5.
    """
    steps = integer("steps", steps, least=1)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    sigma = torch.tensor(karras_levels(steps, sigma_min, sigma_max, rho)[::-1], dtype=torch.float64)
    return Schedule(torch.ones_like(sigma), sigma, sigma)


@on_cpu
def flow(steps: int = 1000, shift: float = 1.0) -> Schedule:
    """A straight path from data to noise: alpha = 1 - s, sigma = s, s = 1/T, 2/T, ..., 1; the network is told 1000 s.

    ``shift`` moves the levels to more noise, for images of more pixels: s' = shift s / (1 + (shift - 1) s).

    Raises:
        ValueError: ``steps`` is not at least 1, or ``shift`` not positive.

    Source: Liu et al. (2023), equation 1; Esser et al. (2024), equation 23 for the shift.
    """
    steps = integer("steps", steps, least=1)
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be more than 0, got {shift}")
    s = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    # Written so that the path ends at exactly 0 and 1 for every shift.
    whole = (1 - s) + shift * s
    sigma = shift * s / whole
    return Schedule((1 - s) / whole, sigma, 1000 * sigma)


def karras_levels(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Equation 5 of Karras et al. (2022), from the most noise to the least; the ends are exact."""
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be more than 0, got {rho}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    inner = [(high + i / (steps - 1) * (low - high)) ** rho for i in range(1, steps - 1)]
    return [sigma_max, *inner, *([sigma_min] if steps > 1 else [])]


def _from_betas(betas: Tensor) -> Schedule:
    alphas_cumprod = (1 - betas).cumprod(0)
    return Schedule(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


def _check_betas(start: float, end: float) -> None:
    if not 0 < start <= end < 1:
        raise ValueError(f"beta_start and beta_end must be 0 < beta_start <= beta_end < 1, got {start} and {end}")
