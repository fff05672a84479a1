"""The likelihood bound of a model on a data set, in nats per image and bits per dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gencore import plugins
from gencore.models.base import GenerativeModel, HasLikelihoodBound
from gencore.models.modes import evaluating
from gencore.noise import Key
from gencore.processes import ALONE, Processes
from gencore.progress import Progress
from gencore.spec import Dataset


@dataclass(frozen=True)
class LikelihoodBound:
    """A lower bound of the mean log p(x) over ``images`` images, with ``num_samples`` draws each.

    ``nats`` is the mean (higher is better; published tables print its negative), ``standard_error`` that of the mean
    over images (and over the draws, which differ from image to image), ``dimensions`` the number of pixels times
    channels.
    """

    nats: float
    standard_error: float
    images: int
    num_samples: int
    dimensions: int

    @property
    def bits_per_dimension(self) -> float:
        """-log2 p(x) per pixel and channel: ``-nats / (dimensions ln 2)``."""
        return -self.nats / (self.dimensions * math.log(2))


@torch.no_grad()
def likelihood_bound(
    model: GenerativeModel,
    data: Dataset,
    key: Key,
    *,
    num_samples: int = 1,
    batch_size: int = 250,
    limit: int | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
) -> LikelihoodBound:
    """The mean of ``model.log_likelihood_bound`` over a data set, in evaluation mode.

    Image ``i`` uses the noise of ``key.samples(i)``, so the figure does not depend on ``batch_size`` (beyond the
    networks' rounding). The mean is in float64.

    Args:
        limit: use the first ``limit`` images only.
        processes: those that share the work; each gives the same result.
        progress: whether to show how far it is, on stderr.

    Raises:
        TypeError: the model has no likelihood bound.
        ValueError: ``batch_size`` or ``limit`` below 1, or what the model's bound refuses.
    """
    if not isinstance(model, HasLikelihoodBound):
        raise TypeError(f"model must have a log_likelihood_bound, and {type(model).__name__} has none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    count = len(data) if limit is None else min(limit, len(data))
    low, high = processes.rows(count)
    mine = torch.empty(high - low, dtype=torch.float64)
    shown = Progress(high - low, name="bound", unit="image", shown=progress and high - low > batch_size)
    with evaluating(model), shown:
        for first in range(low, high, batch_size):
            indices = torch.arange(first, min(first + batch_size, high))
            batch = data.batch(indices).to(model.device)
            # By a ValueError a model refuses images that it gives no likelihood to.
            with plugins.blamed(model.plugin_name, "log_likelihood_bound()", ValueError):
                found = model.log_likelihood_bound(batch, key.samples(first), num_samples)
                if found.shape != indices.shape:
                    # One number for all images would be taken for that of each.
                    raise TypeError(f"it must be of shape {tuple(indices.shape)}, got {tuple(found.shape)}")
                mine[indices - low] = found.double().cpu()
            shown.update(len(indices))
    bounds = torch.cat(processes.gathered(mine))
    error = bounds.std().item() / math.sqrt(count) if count > 1 else math.nan
    return LikelihoodBound(bounds.mean().item(), error, count, num_samples, math.prod(data.spec.image_shape))
