"""How far apart are two sets of images, without supposing a shape of their distributions? The kernel distance (KID)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gencore import ops
from gencore.metrics._features import checked_features
from gencore.metrics.bootstrap import Estimate, resampled, spread
from gencore.noise import Key

# Rows of a kernel matrix that are held at a time.
_ROWS = 1024


@dataclass(frozen=True)
class KernelDistance:
    """The distance, and how it came about.

    Attributes:
        estimate: the distance and its standard error.
        subsets: the number of subsets it is the mean over; None for all images at once.
        subset_size: images of each set in a subset.
        deviation: the standard deviation between subsets, which the literature prints behind the distance.
    """

    estimate: Estimate
    subsets: int | None = None
    subset_size: int | None = None
    deviation: float | None = None


def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    subsets: int | None = None,
    subset_size: int = 1000,
    replicates: int = 0,
    key: Key | None = None,
) -> KernelDistance:
    """The unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x.y / D + 1)^3::

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    Its mean does not depend on the number of images: where the Fréchet distance of few images is too large, this is
    right, and may be a little below 0 for sets of one distribution. The kernel sees differences of the first three
    moments. In float64, a thousand rows of the kernel matrices at a time.

    Args:
        features_a, features_b: (N, D), N at least 2.
        subsets: None takes all images at once, which has the smallest error and takes N^2 kernels; a number takes the
            mean over so many subsets that the key draws, as KID is published.
        subset_size: images of each set in a subset.
        replicates: figures of the bootstrap for the standard error, if all images are taken at once. Of subsets, the
            standard error is their deviation scaled from their size to that of the sets (Politis and Romano 1994).
        key: needed for subsets and replicates.

    Raises:
        ValueError: other shapes, features that are not finite, subsets that are larger than a set, no key.

    Source: Gretton et al., "A kernel two-sample test" (2012), equation 3; for images Binkowski et al., "Demystifying
    MMD GANs" (2018).
    """
    a, b = checked_features(2, features_a=features_a, features_b=features_b)
    if (subsets is not None or replicates) and key is None:
        raise ValueError("key must be given for subsets and replicates, got None")
    if subsets is None:
        counts = [torch.ones(1, len(x)).double() for x in (a, b)]
        if key is not None:
            drawn = [resampled(len(x), replicates, key.stream(i)) for i, x in enumerate((a, b))]
            counts = [torch.cat(pair) for pair in zip(counts, drawn, strict=True)]
        found = _squared_discrepancies(a, b, *counts)
        return KernelDistance(Estimate(found[0].item(), spread(found[1:])))
    fewest = min(len(a), len(b))
    if subsets < 1 or not 2 <= subset_size <= fewest:
        raise ValueError(
            f"subsets must be at least 1, and subset_size from 2 to the images of a set, {fewest}, "
            f"got {subsets} and {subset_size}"
        )
    assert key is not None
    ones = torch.ones(1, subset_size).double()
    scores = []
    for number in range(subsets):
        chosen = [_chosen(x, subset_size, key.stream(i).samples(number)) for i, x in enumerate((a, b))]
        scores.append(_squared_discrepancies(chosen[0], chosen[1], ones, ones))
    every = torch.cat(scores)
    deviation = spread(every)
    error = deviation * (subset_size / fewest) ** 0.5
    return KernelDistance(Estimate(every.mean().item(), error), subsets, subset_size, deviation)


def _chosen(features: Tensor, count: int, key: Key) -> Tensor:
    """So many of the features, without repetition."""
    order = ops.uniform((1, len(features)), key, dtype=torch.float64)[0].argsort(stable=True)
    return features[order[:count]]


def _squared_discrepancies(a: Tensor, b: Tensor, counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """The distances (R,) of images that count as often as each row of ``counts_a`` (R, N), ``counts_b`` (R, M) says.

    An image that is drawn twice is compared with itself no more than one that is drawn once.
    """

    def within(x: Tensor, counts: Tensor) -> Tensor:
        n = counts.sum(1)
        squares = counts.square()
        total = _kernel_sums(x, x, counts, counts) - squares @ _kernel((x * x).sum(1), x.shape[1])
        return total / (n.square() - squares.sum(1))

    across = _kernel_sums(a, b, counts_a, counts_b) / (counts_a.sum(1) * counts_b.sum(1))
    return within(a, counts_a) + within(b, counts_b) - 2 * across


def _kernel_sums(a: Tensor, b: Tensor, counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """sum_ij counts_a[r, i] k(a_i, b_j) counts_b[r, j] for each r."""
    sums = torch.zeros(len(counts_a), dtype=torch.float64)
    for first in range(0, len(a), _ROWS):
        kernels = _kernel(a[first : first + _ROWS] @ b.T, a.shape[1])
        sums += ((counts_a[:, first : first + _ROWS] @ kernels) * counts_b).sum(1)
    return sums


def _kernel(products: Tensor, size: int) -> Tensor:
    return (products / size + 1) ** 3
