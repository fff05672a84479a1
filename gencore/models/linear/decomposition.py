"""Principal components of images that need not fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gencore import ops
from gencore.noise import Key

# Up to this many values of an image (or this many images), a square matrix of float64 takes at most 128 MiB.
_MATRIX = 4096
# Randomised subspace iteration: spare directions, and passes over the images after the first.
_SPARE, _PASSES = 10, 7


@dataclass(frozen=True)
class Components:
    """The principal components of N images of D values.

    Attributes:
        mean: (D,) float64.
        directions: (K, D) float64, orthonormal; the value of largest magnitude in each is positive.
        variances: (K,) float64, of the images along each direction, the largest first: eigenvalues of the covariance.
        total: the sum of all D eigenvalues.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    total: float


def principal_components(images: Callable[[], Iterable[Tensor]], count: int) -> Components:
    """The ``count`` first eigenvectors and eigenvalues of the covariance (divided by N - 1), in float64.

    ``images()`` gives the images anew, in blocks (B, D); only a block and matrices of at most 4096 x 4096 values are in
    memory at a time. Where images have up to 4096 values, the covariance itself is decomposed; where there are up to
    4096 images, the matrix of their products (Turk and Pentland 1991). Larger data go through randomised subspace
    iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), which passes over the images nine times.

    Deterministic for one number of threads.

    Raises:
        ValueError: fewer than two images, ``count`` above min(N - 1, D), or images that are not finite.
    """
    number, mean, squares = _moments(images)
    size = len(mean)
    if count > min(number - 1, size):
        least = f"at most {min(number - 1, size)}"
        raise ValueError(f"count must be {least} for {number} images of {size} values, got {count}")
    total = float(squares) / (number - 1)
    if size <= _MATRIX:
        variances, directions = _by_covariance(images, mean, number, count)
    elif number <= _MATRIX:
        variances, directions = _by_products(images, mean, number, count)
    else:
        variances, directions = _by_iteration(images, mean, number, count)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return Components(mean, directions * torch.where(largest < 0, -1.0, 1.0), variances.clamp(min=0), total)


def _moments(images: Callable[[], Iterable[Tensor]]) -> tuple[int, Tensor, Tensor]:
    """How many images, their mean, and the sum of squares about it, by Chan, Golub and LeVeque's (1983) update."""
    number, mean, squares = 0, torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for block in images():
        values = block.double()
        own = values.mean(0)
        squares = squares + (values - own).square().sum()
        if number:
            squares = squares + (own - mean).square().sum() * (number * len(values) / (number + len(values)))
            mean = mean + (own - mean) * (len(values) / (number + len(values)))
        else:
            mean = own
        number += len(values)
    if number < 2:
        raise ValueError(f"images must be at least two, got {number}")
    if not bool(squares.isfinite()):
        raise ValueError("images must be finite, and some are not")
    return number, mean, squares


def _by_covariance(
    images: Callable[[], Iterable[Tensor]], mean: Tensor, number: int, count: int
) -> tuple[Tensor, Tensor]:
    covariance = mean.new_zeros(len(mean), len(mean))
    for block in images():
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / (number - 1))
    values, vectors = torch.linalg.eigh(covariance)
    return values[-count:].flip(0), vectors[:, -count:].T.flip(0)


def _by_products(
    images: Callable[[], Iterable[Tensor]], mean: Tensor, number: int, count: int
) -> tuple[Tensor, Tensor]:
    # At most 4096 images are here, so that all of them fit.
    centred = torch.cat([block.double() - mean for block in images()])
    values, vectors = torch.linalg.eigh(centred @ centred.T / (number - 1))
    vectors = vectors[:, -count:].flip(1)
    # A direction without variance has no image of its own among the products: QR completes the basis.
    directions = torch.linalg.qr(centred.T @ vectors).Q.T
    return values[-count:].flip(0), directions


def _by_iteration(
    images: Callable[[], Iterable[Tensor]], mean: Tensor, number: int, count: int
) -> tuple[Tensor, Tensor]:
    width = min(count + _SPARE, number - 1, len(mean))
    basis = ops.normal((len(mean), width), Key(0), dtype=torch.float64, device=mean.device)
    for _ in range(1 + _PASSES):
        basis = torch.linalg.qr(_covariance_times(images, mean, number, basis)).Q
    product = _covariance_times(images, mean, number, basis)
    values, vectors = torch.linalg.eigh(basis.T @ product)
    return values[-count:].flip(0), (basis @ vectors[:, -count:]).T.flip(0)


def _covariance_times(images: Callable[[], Iterable[Tensor]], mean: Tensor, number: int, basis: Tensor) -> Tensor:
    product = torch.zeros_like(basis)
    for block in images():
        centred = block.double() - mean
        product.addmm_(centred.T, centred @ basis, alpha=1 / (number - 1))
    return product
