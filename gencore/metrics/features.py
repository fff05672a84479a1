"""What networks see in images: the features that sets of images are compared by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore.metrics.classes import Classifier
from gencore.progress import Progress

# The one extractor whose Fréchet distance is FID.
INCEPTION = "Inception-v3"


@runtime_checkable
class FeatureExtractor(Protocol):
    """Features of images. A measure names the extractor beside its figure: those of two cannot be compared.

    Attributes:
        name: as it stands beside a figure, such as ``EfficientNet-Lite0``.
        size: D, the number of features.
        fingerprint: a hash of all that the features depend on: weights, and how images are prepared.
    """

    name: str
    size: int
    fingerprint: str

    def __call__(self, images: Tensor) -> Tensor:
        """(N, D) float32 on the CPU, for images (N, C, H, W) in [0, 1]."""


@runtime_checkable
class HasClasses(Protocol):
    """An extractor whose network goes on to classes, which the Inception Score needs."""

    def probabilities(self, features: Tensor) -> Tensor:
        """p(class|image), (N, classes) float32, of the features (N, D) of images."""


@runtime_checkable
class HasLayers(Protocol):
    """An extractor that gives what it sees on the way, which a perceptual distance needs."""

    def layers(self, images: Tensor) -> list[Tensor]:
        """(N, C_l, H_l, W_l) for each layer l, for images (N, C, H, W) in [0, 1]; with a gradient where images have."""


class ClassifierFeatures:
    """The features of a classifier of the data set itself: what its last layer sees. They need no download, know what
    tells these classes apart, and nothing else."""

    def __init__(self, classifier: Classifier):
        self._classifier = classifier
        self.name = "classifier"
        weights = classifier.network.state_dict()
        self.fingerprint = fingerprint_of("classifier", weights)
        head: Any = classifier.network.head
        self.size = int(head.in_features)

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        return self._classifier.features(images)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        head = self._classifier.network.head
        device = next(self._classifier.network.parameters()).device
        return torch.softmax(head(features.to(device)), 1).float().cpu()  # type: ignore[operator]


def features_of(
    extractor: FeatureExtractor, batches: Iterable[Tensor], total: int, *, name: str, progress: bool = False
) -> Tensor:
    """The features (N, D) float32 of images that come in batches; of the images none is kept.

    Args:
        extractor: what sees them.
        batches: images (B, C, H, W) in [0, 1].
        total: N, for the bar.
        name: what the images are called, for the bar and for errors.
        progress: whether to show how far it is, on stderr.

    Raises:
        ValueError: images that are not finite, or of a shape that the extractor does not take; another number of them.
    """
    found, row = torch.empty(total, extractor.size), 0
    with Progress(total, name=f"{extractor.name}, {name}", unit="image", shown=progress, delay=1.0) as shown:
        for images in batches:
            try:
                if row + len(images) <= total:
                    found[row : row + len(images)] = extractor(images)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            row += len(images)
            shown.update(len(images))
    if row != total:
        raise ValueError(f"{name}: batches must hold {total} images, got {row}")
    return found


def check_images(images: Tensor) -> None:
    """Raises ValueError unless ``images`` are (N, C, H, W) with 1 to 4 channels, and finite."""
    if images.dim() != 4 or not 1 <= images.shape[1] <= 4 or 0 in images.shape[2:]:
        raise ValueError(f"images must be of shape (N, 1 to 4, H, W), got {tuple(images.shape)}")
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(f"images must be finite, but {broken} of {len(images)} hold NaN or infinity")


def rgb(images: Tensor) -> Tensor:
    """Images of 1 to 4 channels with three: gray ones repeated, a second or fourth channel as opacity before white."""
    check_images(images)
    images = images.float()
    if images.shape[1] in (2, 4):
        opacity = images[:, -1:]
        images = images[:, :-1] * opacity + (1 - opacity)
    return images.expand(-1, 3, -1, -1)


def resized(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) made ``size`` x ``size`` by bicubic interpolation with antialiasing, in float, neither
    rounded to 8 bits nor cut to [0, 1]: Pillow's filter, as clean-fid takes it (Parmar et al. 2022).

    Without antialiasing, figures of images that are made smaller depend on the library more than on the model.
    """
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)


def fingerprint_of(what: str, weights: Mapping[str, Tensor]) -> str:
    """A hash of weights, and of ``what``: the network and how images are prepared, in words."""
    digest = hashlib.blake2b(what.encode(), digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
