"""Which of many vectors lie nearest? Exact, in float64, with a block of the distances at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gencore.metrics._features import checked_features

# Distances that are held at a time: 128 MiB.
_AT_A_TIME = 1 << 24


class Neighbours(NamedTuple):
    """For each of N queries its k nearest, the nearest first: (N, k) float64 and (N, k) int64."""

    distances: Tensor
    indices: Tensor


def nearest(queries: Tensor, points: Tensor, k: int = 1) -> Neighbours:
    """The ``k`` nearest of ``points`` (M, D) to each of ``queries`` (N, D), by Euclidean distance.

    Where queries are the points, the first neighbour of each is a point at distance 0: itself, or one that is equal.

    Raises:
        ValueError: other shapes, vectors that are not finite, fewer than ``k`` points, ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    checked_features(k, points=points)
    queries, points = checked_features(0, queries=queries, points=points)
    distances = torch.empty(len(queries), k, dtype=torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    for rows, block in distance_blocks(queries, points):
        distances[rows], indices[rows] = block.topk(k, dim=1, largest=False, sorted=True)
    return Neighbours(distances, indices)


def nearest_in(queries: Tensor, batches: Iterable[Tensor], k: int = 1) -> Neighbours:
    """:func:`nearest` of points that come in batches, none of which is kept; indices count through all of them.

    Raises:
        ValueError: as :func:`nearest`; fewer than ``k`` points in all.
    """
    found: Neighbours | None = None
    first = 0
    for points in batches:
        own = nearest(queries, points, min(k, len(points)))
        own = Neighbours(own.distances, own.indices + first)
        first += len(points)
        if found is not None:
            distances, indices = (torch.cat(pair, dim=1) for pair in zip(found, own, strict=True))
            # Stable: of equal ones the first.
            order = distances.argsort(dim=1, stable=True)[:, :k]
            own = Neighbours(distances.gather(1, order), indices.gather(1, order))
        found = own
    if found is None or first < k:
        raise ValueError(f"batches must hold at least {k} points, got {first}")
    return found


def distance_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The Euclidean distances of the rows of ``a`` from those of ``b``, both float64, in blocks of rows.

    By |a|^2 + |b|^2 - 2 a.b of vectors that are centred first: a common mean would cost digits. Equal vectors get the
    distance 0 up to rounding, 1e-8 of their length.
    """
    middle = b.mean(0)
    a, b = a - middle, b - middle
    squares_a, squares_b = a.square().sum(1), b.square().sum(1)
    rows = max(1, _AT_A_TIME // max(1, len(b)))
    for first in range(0, len(a), rows):
        chosen = slice(first, min(first + rows, len(a)))
        squares = torch.addmm(squares_a[chosen, None] + squares_b, a[chosen], b.T, alpha=-2)
        yield chosen, squares.clamp_(min=0).sqrt_()
