"""What are codes good for? The accuracy of a linear classifier of them (Alain and Bengio 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the optimiser of the logistic regression, which is convex: it ends when it has converged.
_ITERATIONS = 1000


def linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, *, penalty: float = 1.0
) -> float:
    """The share of ``test_features`` whose class a multinomial logistic regression of ``features`` finds.

    Each feature is first brought to mean 0 and variance 1 on ``features``, so that the figure does not depend on its
    unit. In float64; deterministic.

    Args:
        features, test_features: (N, D) and (M, D).
        labels, test_labels: (N,) and (M,), int64.
        penalty: 1/2 of it times the squared norm of the weights is added to the sum of the cross-entropies.

    Raises:
        ValueError: shapes that do not go together, features that are not finite, one class only, a negative penalty.
    """
    for name, values, classes in (("features", features, labels), ("test_features", test_features, test_labels)):
        if values.dim() != 2 or len(values) == 0 or classes.shape != values.shape[:1]:
            shapes = f"{tuple(values.shape)} and {tuple(classes.shape)}"
            raise ValueError(f"{name} must be of shape (N, D) with a label each, got {shapes}")
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} must be finite, but {int((~values.isfinite()).sum())} values are not")
    if features.shape[1] != test_features.shape[1]:
        raise ValueError(f"features must be of one size, got {features.shape[1]} and {test_features.shape[1]}")
    if len(labels.unique()) < 2:
        raise ValueError("labels must be of at least two classes, got one")
    if penalty < 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    from sklearn.linear_model import LogisticRegression

    known, asked = (values.detach().to("cpu", torch.float64) for values in (features, test_features))
    mean, deviation = known.mean(0), known.std(0, correction=0)
    # A feature that never changes tells nothing.
    scale = torch.where(deviation > 0, deviation, 1.0)
    strength = {"C": 1 / penalty} if penalty > 0 else {"C": float("inf")}
    classifier = LogisticRegression(max_iter=_ITERATIONS, **strength)
    classifier.fit(((known - mean) / scale).numpy(), labels.cpu().numpy())
    found = torch.from_numpy(classifier.predict(((asked - mean) / scale).numpy()))
    return (found == test_labels.cpu()).double().mean().item()
