"""How far apart are two sets of images, as normal distributions of a classifier's features?"""

from __future__ import annotations

import torch
from torch import Tensor

# What this distance is called wherever it is shown. FID is the same formula with the features of one Inception network
# that everybody uses; figures with other features cannot be compared with it.
FRECHET_NAME = "Fréchet distance, features of the classifier (not FID)"


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """The Fréchet distance, squared as FID is, of the normal distributions with the moments of two sets of features::

        |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    With the centred features A, C_a = A^T A, the last trace is the sum of the singular values of A B^T. No square root
    of a matrix is taken, so nothing is lost where the covariances are singular, as they are with fewer samples than
    features. In float64.

    Computed from samples it is too large, by about c/n: compare figures of equal n only, and know the one that true
    images have against others.

    Args:
        features_a, features_b: (N, D), N at least 2, not necessarily the same for both.

    Raises:
        ValueError: other shapes, or features that are not finite.

    Source: Dowson and Landau, "The Frechet distance between multivariate normal distributions" (1982); for images
    Heusel et al. (2017), equation 6.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(f"{name} must be of shape (N, D) with N at least 2, got {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} must be finite, but {int((~features.isfinite()).sum())} values are not")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"features must be of one size, got {features_a.shape[1]} and {features_b.shape[1]}")
    (mean_a, root_a), (mean_b, root_b) = _moments(features_a), _moments(features_b)
    traces = root_a.square().sum() + root_b.square().sum()
    common = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + traces - 2 * common).item())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R (at most D rows) with R^T R the unbiased covariance."""
    features = features.detach().to("cpu", torch.float64)
    mean = features.mean(0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    # The triangular factor has the same R^T R, and no more than D rows however many samples there are.
    return mean, torch.linalg.qr(centred, mode="r").R
