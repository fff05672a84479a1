"""Definition of :func:`gencore.ops.denoising_loss`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def denoising_loss(output: Tensor, x0: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
    """The mean over elements of weight (prediction - target)^2 + bound_weight L_t.

    ``rows``, one or one per sample, have the columns of :meth:`gencore.schedule.Schedule.loss_table`. Where ``output``
    has twice the channels of ``x0``, the second half places the log variance in its range, and alone has a gradient of
    L_t.
    """
    columns = rows.to(x0.dtype).reshape(-1, 8, *[1] * (x0.dim() - 1)).unbind(1)
    of_x0, of_noise, weight, bound_weight, moved, middle, half_range, true = columns
    learned = output.shape != x0.shape
    prediction, place = output.chunk(2, dim=1) if learned else (output, torch.zeros_like(output))
    error = prediction - (of_x0 * x0 + of_noise * noise)
    terms = weight * error.square()
    # Where there is none its terms need not be finite, and neither need their derivatives.
    bounded = bound_weight != 0
    shift = torch.where(bounded, (moved * error).detach(), 0)
    log_variance = torch.where(bounded, middle + half_range * place, 0)
    first = torch.isneginf(true)
    gap = log_variance - torch.where(first | ~bounded, 0, true)
    kl = (-1 + gap + torch.exp(-gap) + shift.square() * torch.exp(-log_variance)) / 2
    bound = torch.where(first, decoder_nll(x0.detach(), (x0 + shift).detach(), log_variance), kl)
    terms = terms + torch.where(bounded, bound_weight * bound, 0)
    return terms.reshape(x0.shape[0], math.prod(x0.shape[1:])).mean(1)


def decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x0 | x1) of 8-bit data in [-1, 1], whose outermost bins reach to infinity (Ho et al. 2020, eq. 13)."""
    deviation, centered = torch.exp(log_variance / 2), x0 - mean
    above = torch.special.ndtr((centered + 1 / 255) / deviation)
    below = torch.special.ndtr((centered - 1 / 255) / deviation)
    # Of the two tails, the one whose difference loses no digits.
    above_other = torch.special.ndtr((1 / 255 - centered) / deviation)
    below_other = torch.special.ndtr((-centered - 1 / 255) / deviation)
    inner = torch.where(centered > 0, above_other - below_other, above - below)
    probability = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, above_other, inner))
    return -torch.log(probability.clamp(min=1e-12))
