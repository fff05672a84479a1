"""How far may a figure be off by chance? The bootstrap: the figure again, of images drawn from the images at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gencore import ops
from gencore.noise import Key

# Standard errors from the figure to either end of its interval: 95% of a normal distribution lie between them.
_WIDTH = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, NaN where it is not known.

    The interval is the normal one, ``value`` and 1.96 standard errors to either side, not that of the percentiles: a
    distance between two sets grows when images are drawn twice, so the middle of the bootstrap's figures is too large,
    while their spread is right (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 13).
    """

    value: float
    standard_error: float = math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Holds, in 95 of 100 cases, the mean figure of such sets: of as many images of the same kinds."""
        return self.value - _WIDTH * self.standard_error, self.value + _WIDTH * self.standard_error


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of values (N,). Its standard error needs no drawing: it is what the bootstrap comes to."""
    values = values.detach().double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


def spread(values: Tensor) -> float:
    """The standard deviation of the bootstrap's figures (R,): the standard error. NaN of fewer than two."""
    return values.double().std().item() if len(values) > 1 else math.nan


def resampled(n: int, replicates: int, key: Key) -> Tensor:
    """How often each of ``n`` images is drawn, (replicates, n) float64; the sum of each row is ``n``.

    A pure function of the key: row ``r`` uses the noise of ``key.samples(r)``.

    Raises:
        ValueError: ``n`` below 1, or ``replicates`` below 0.
    """
    if n < 1 or replicates < 0:
        raise ValueError(f"n must be at least 1 and replicates at least 0, got {n} and {replicates}")
    counts = torch.empty(replicates, n, dtype=torch.float64)
    for row in range(replicates):
        # The rounded product is below n: uniform() is at most 1 - 2^-24, and this is float64.
        drawn = (ops.uniform((1, n), key.samples(row), dtype=torch.float64)[0] * n).long()
        counts[row] = drawn.bincount(minlength=n)
    return counts
