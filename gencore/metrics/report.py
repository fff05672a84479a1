"""All measures of one set of images against another, by the features of one extractor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from gencore.metrics._features import checked_features
from gencore.metrics.bootstrap import Estimate, mean_estimate
from gencore.metrics.features import INCEPTION, FeatureExtractor, HasClasses
from gencore.metrics.frechet import frechet_distance, frechet_estimate
from gencore.metrics.inception_score import inception_score
from gencore.metrics.kernel import kernel_distance
from gencore.metrics.manifold import Manifold, manifold
from gencore.noise import Key

Measure = Literal["frechet", "kernel", "precision", "recall", "density", "coverage", "score"]

# What the two distances and the score are called: with the features that everybody uses, and with others.
_NAMES = {"frechet": ("FID", "FD"), "kernel": ("KID", "KD"), "score": ("Inception Score", "IS")}
_LOWER: tuple[Measure, ...] = ("frechet", "kernel")
# Up to so many images a set, the kernel distance is of all at once; beyond, the mean over subsets, as KID is published.
_MOST, _SUBSETS, _SUBSET_SIZE = 10_000, 100, 1000
# The Inception Score of the literature has ten splits of so many.
_SPLIT = 5000
# A neighbourhood needs more images than its fifth neighbour.
LEAST_IMAGES = 6


@dataclass(frozen=True)
class Figure:
    """One measure of samples.

    Attributes:
        measure: which.
        name: with the features that it is by, as it is shown.
        estimate: its value and standard error.
        better: whether lower or higher is better.
        real: the same of real images, against the same real images; None where there were no others.
    """

    measure: Measure
    name: str
    estimate: Estimate
    better: Literal["lower", "higher"]
    real: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        low, high = self.estimate.interval
        return {
            "measure": self.measure,
            "name": self.name,
            "value": self.estimate.value,
            "standard_error": self.estimate.standard_error,
            "interval": [low, high],
            "better": self.better,
            "real": self.real,
        }


def figure_name(measure: Measure, extractor: str) -> str:
    """``FID`` and ``KID`` with the features that everybody uses, ``FD (EfficientNet-Lite0)`` with others."""
    if measure not in _NAMES:
        return f"{measure} ({extractor})"
    ours, others = _NAMES[measure]
    return ours if extractor == INCEPTION else f"{others} ({extractor})"


def compare(
    extractor: FeatureExtractor,
    real: Tensor,
    fake: Tensor,
    other: Tensor | None = None,
    *,
    replicates: int = 20,
    key: Key,
) -> list[Figure]:
    """Every measure of samples against real images.

    Args:
        extractor: whose features these are; one with classes gives the Inception Score too.
        real, fake: features of real images (N, D) and of samples (M, D).
        other: features of other real images, best as many as samples: their figures stand beside those of the samples,
            and say what a perfect model would have.
        replicates: figures of the bootstrap for each standard error that needs them.
        key: of the bootstrap.

    Raises:
        ValueError: features that are not finite, or fewer than 6 images of a kind.
    """
    real, fake = checked_features(LEAST_IMAGES, real=real, fake=fake)
    figures = _estimates(extractor, real, fake, replicates, key)
    floor: dict[Measure, Estimate] = {}
    if other is not None and len(other) >= LEAST_IMAGES:
        (other,) = checked_features(LEAST_IMAGES, other=other)
        floor = _estimates(extractor, real, other, 0, key)
    return [
        Figure(
            measure,
            figure_name(measure, extractor.name),
            estimate,
            "lower" if measure in _LOWER else "higher",
            floor[measure].value if measure in floor else None,
        )
        for measure, estimate in figures.items()
    ]


def _estimates(
    extractor: FeatureExtractor, real: Tensor, fake: Tensor, replicates: int, key: Key
) -> dict[Measure, Estimate]:
    found: dict[Measure, Estimate] = {}
    if replicates:
        found["frechet"] = frechet_estimate(real, fake, replicates=replicates, key=key.fold_in(1))
    else:
        found["frechet"] = Estimate(frechet_distance(real, fake))
    many = max(len(real), len(fake)) > _MOST
    size = min(_SUBSET_SIZE, len(real), len(fake))
    found["kernel"] = kernel_distance(
        real,
        fake,
        subsets=_SUBSETS if many else None,
        subset_size=size,
        replicates=replicates,
        key=key.fold_in(2),
    ).estimate
    found |= _means(manifold(real, fake))
    if isinstance(extractor, HasClasses):
        p = extractor.probabilities(fake.float())
        splits = max(1, min(10, len(p) // _SPLIT))
        found["score"] = inception_score(p, splits=splits, replicates=replicates, key=key.fold_in(3))
    return found


def _means(found: Manifold) -> dict[Measure, Estimate]:
    values: dict[Measure, Tensor] = {
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
    }
    return {measure: mean_estimate(each) for measure, each in values.items()}
