"""Are samples recognisable, each of one class, and of all classes together?"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gencore.metrics.bootstrap import Estimate, resampled, spread
from gencore.noise import Key

# Probabilities that are not finite, or of which a row sums to something else than 1 by more than this.
_TOLERANCE = 1e-3


def inception_score(probabilities: Tensor, *, splits: int = 1, replicates: int = 0, key: Key | None = None) -> Estimate:
    """exp of the mutual information of image and class, as a classifier sees it, between 1 and the number of classes::

        exp(E_x KL(p(y|x) || p(y)))      with p(y) = E_x p(y|x)

    It looks at samples alone: it does not see whether they resemble the data, nor whether a class has one image only,
    over and over. Computed from n samples it is too small, as p(y) fits these samples. Another classifier gives
    figures on another scale; only those of Inception-v3 on ImageNet's classes are those of the literature.

    Args:
        probabilities: p(y|x), (N, classes).
        splits: parts of the samples, one after the other, whose scores are averaged; 10 parts of 5,000 in the
            literature. The standard error is then that of the mean of the splits.
        replicates: figures of the bootstrap for the standard error, where there is one split.
        key: of the bootstrap; needed for ``replicates`` above 0.

    Raises:
        ValueError: no (N, classes) of distributions, fewer samples than splits.

    Source: Salimans et al., "Improved techniques for training GANs" (2016), section 4; for its faults Barratt and
    Sharma, "A note on the Inception Score" (2018).
    """
    if probabilities.dim() != 2 or len(probabilities) == 0:
        raise ValueError(f"probabilities must be of shape (N, classes), got {tuple(probabilities.shape)}")
    p = probabilities.detach().to("cpu", torch.float64)
    # NaN is no small difference either.
    if not bool(((p.sum(1) - 1).abs() < _TOLERANCE).all()) or bool((p < 0).any()):
        raise ValueError("probabilities must be at least 0, and sum to 1 in each row")
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits must be between 1 and the number of samples, {len(p)}, got {splits}")
    if replicates and key is None:
        raise ValueError(f"key must be given for {replicates} replicates, got None")
    own = torch.xlogy(p, p).sum(1)
    if splits > 1:
        bounds = [i * len(p) // splits for i in range(splits + 1)]
        parts = list(pairwise(bounds))
        scores = torch.cat([_scores(p[a:b], own[a:b], torch.ones(1, b - a).double()) for a, b in parts])
        return Estimate(scores.mean().item(), spread(scores) / splits**0.5)
    value = _scores(p, own, torch.ones(1, len(p)).double()).item()
    if key is None:
        return Estimate(value)
    return Estimate(value, spread(_scores(p, own, resampled(len(p), replicates, key))))


def _scores(p: Tensor, own: Tensor, weights: Tensor) -> Tensor:
    """The scores (R,) of samples that count as often as each row of ``weights`` (R, N) says.

    E KL(p(y|x) || p(y)) = E sum p(y|x) log p(y|x) - sum p(y) log p(y).
    """
    total = weights.sum(1)
    marginal = weights @ p / total[:, None]
    return (weights @ own / total - torch.xlogy(marginal, marginal).sum(1)).exp()
