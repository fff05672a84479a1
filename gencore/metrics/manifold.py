"""Do samples lie where real images lie, and everywhere there? Precision and recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gencore.metrics._features import checked_features
from gencore.metrics.neighbours import distance_blocks, nearest


@dataclass(frozen=True, eq=False)
class Manifold:
    """Values whose means are the four measures; :func:`gencore.metrics.mean_estimate` gives these.

    Attributes:
        precision: (M,) for each sample, whether it lies in the ball of a real image: are samples realistic?
        recall: (N,) for each real image, whether it lies in the ball of a sample: do samples have its variety?
        density: (M,) for each sample, in how many balls of real images it lies, divided by their k; the mean may be
            above 1.
        coverage: (N,) for each real image, whether a sample lies in its ball.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def manifold(real: Tensor, fake: Tensor, *, k: int = 3, k_density: int = 5) -> Manifold:
    """Where samples and real images lie, each set described by balls around its features up to the k-th neighbour::

        ball(x) = {y: |x - y| <= distance of x to its k-th neighbour in its set}

    Precision and recall mistake an outlier's large ball for a place where images are; density and coverage count balls
    of real images only, and weigh less what few of them hold. All depend on the number of images and on k: compare
    figures of equal ones. None sees the images, only their features: two images of one class may be neighbours there.

    Distances are in float64, from products of the centred features, a block of them at a time; N x N, M x M and N x M
    are computed, none is held.

    Args:
        real, fake: (N, D) and (M, D), both with more than ``max(k, k_density)`` rows.
        k: of precision and recall, 3 in the paper.
        k_density: of density and coverage, 5 in the paper.

    Raises:
        ValueError: other shapes, features that are not finite, too few of them, k below 1.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models" (2019), equation
    1 and 2; Naeem et al., "Reliable fidelity and diversity metrics for generative models" (2020), equation 3 and 4.
    """
    if k < 1 or k_density < 1:
        raise ValueError(f"k and k_density must be at least 1, got {k} and {k_density}")
    most = max(k, k_density)
    real, fake = checked_features(most + 1, real=real, fake=fake)
    # Its own first neighbour is the image itself.
    of_real = nearest(real, real, most + 1).distances
    of_fake = nearest(fake, fake, k + 1).distances[:, k]
    precise, dense = torch.zeros(len(fake), dtype=torch.bool), torch.zeros(len(fake), dtype=torch.float64)
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    for rows, distances in distance_blocks(real, fake):
        precise |= (distances <= of_real[rows, k, None]).any(0)
        within = distances <= of_real[rows, k_density, None]
        dense += within.sum(0)
        covered[rows] = within.any(1)
        recalled[rows] = (distances <= of_fake).any(1)
    return Manifold(precise.double(), recalled.double(), dense / k_density, covered.double())
