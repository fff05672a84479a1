"""How far apart are two sets of images, as normal distributions of their features?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gencore.metrics._features import checked_features
from gencore.metrics.bootstrap import Estimate, resampled, spread
from gencore.noise import Key

# What this distance is called wherever it is shown. FID is the same formula with the features of one Inception network
# that everybody uses; figures with other features cannot be compared with it.
FRECHET_NAME = "Fréchet distance, features of the classifier (not FID)"


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of ``count`` features, in float64: all that the distance needs."""

    count: int
    mean: Tensor
    covariance: Tensor


def moments(batches: Iterable[Tensor]) -> Moments:
    """The moments of features (N, D) that come in batches, none of which is kept.

    Each batch is centred by its own mean, and the sums are put together by it, so that a mean far from 0 costs no
    digits.

    Raises:
        ValueError: fewer than two features, other sizes, or features that are not finite.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        if count == 0:
            mean = torch.zeros(batch.shape[-1], dtype=torch.float64)
            scatter = torch.zeros(batch.shape[-1], batch.shape[-1], dtype=torch.float64)
        _, features = checked_features(0, features=mean[None], batch=batch)
        if len(features) == 0:
            continue
        own = features.mean(0)
        centred = features - own
        total, difference = count + len(features), own - mean
        scatter = scatter + centred.T @ centred + torch.outer(difference, difference) * (count * len(features) / total)
        mean, count = mean + difference * (len(features) / total), total
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 features, got {count}")
    return Moments(count, mean, scatter / (count - 1))


def frechet_distance(features_a: Tensor | Moments, features_b: Tensor | Moments) -> float:
    """The Fréchet distance, squared as FID is, of the normal distributions with the moments of two sets of features::

        |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    With R^T R = C, the last trace is the sum of the singular values of R_a R_b^T. From features R comes by a QR
    decomposition, and no square root of a matrix is taken: nothing is lost where the covariances are singular, as they
    are with fewer samples than features. From :class:`Moments` it comes by their eigenvalues, those that are rounding
    taken for 0. In float64.

    Computed from samples it is too large, by about c/n: compare figures of equal n only, and know the one that true
    images have against others.

    Args:
        features_a, features_b: (N, D), N at least 2, not necessarily the same for both; or their moments.

    Raises:
        ValueError: other shapes, or features that are not finite.

    Source: Dowson and Landau, "The Frechet distance between multivariate normal distributions" (1982); for images
    Heusel et al. (2017), equation 6.
    """
    sets = {"features_a": features_a, "features_b": features_b}
    checked = checked_features(2, **{name: x for name, x in sets.items() if isinstance(x, Tensor)})
    given = [checked.pop(0) if isinstance(x, Tensor) else x for x in sets.values()]
    (mean_a, root_a), (mean_b, root_b) = map(_rooted, given)
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"features must be of one size, got {len(mean_a)} and {len(mean_b)}")
    return _distance(mean_a, root_a, mean_b, root_b)


def frechet_estimate(features_a: Tensor, features_b: Tensor, *, replicates: int = 20, key: Key) -> Estimate:
    """:func:`frechet_distance` with its standard error by the bootstrap of both sets: ``replicates`` distances more."""
    value = frechet_distance(features_a, features_b)
    a, b = checked_features(2, features_a=features_a, features_b=features_b)
    counts = [resampled(len(x), replicates, key.stream(i)) for i, x in enumerate((a, b))]
    pairs = zip(*counts, strict=True)
    found = [_distance(*_rooted(_repeated(a, of_a)), *_rooted(_repeated(b, of_b))) for of_a, of_b in pairs]
    return Estimate(value, spread(torch.tensor(found)))


def _distance(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    traces = root_a.square().sum() + root_b.square().sum()
    common = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + traces - 2 * common).item())


def _repeated(features: Tensor, counts: Tensor) -> Tensor:
    return features.repeat_interleave(counts.long(), dim=0)


def _rooted(of: Tensor | Moments) -> tuple[Tensor, Tensor]:
    """The mean, and R (at most D rows) with R^T R the unbiased covariance."""
    if isinstance(of, Moments):
        values, vectors = torch.linalg.eigh(of.covariance)
        least = values.abs().amax() * len(values) * torch.finfo(values.dtype).eps
        return of.mean, torch.where(values > least, values, 0).sqrt()[:, None] * vectors.T
    mean = of.mean(0)
    centred = (of - mean) / (len(of) - 1) ** 0.5
    # The triangular factor has the same R^T R, and no more than D rows however many samples there are.
    return mean, torch.linalg.qr(centred, mode="r").R if len(of) > of.shape[1] else centred
