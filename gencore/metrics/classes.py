"""Which classes do a model's samples show? A classifier of the data set tells, and so finds a collapse to a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import ops
from gencore.data import ImageDataset
from gencore.metrics.modes import evaluating
from gencore.models.base import GenerativeModel
from gencore.noise import Key

_HIDDEN, _BATCH = 256, 128
# A class counts as present with a fifth of the share it would have if all were equally frequent: 2% of ten classes.
_PRESENT = 0.2
# Folded into the seed, so that the classifier's minibatches share no noise with what is measured of the same seed.
_CLASSIFIER = int.from_bytes(b"classify", "big")


@dataclass(frozen=True)
class Classifier:
    """A trained classifier and how well it does on images that it was not trained on."""

    network: nn.Module
    class_names: tuple[str, ...]
    test_accuracy: float

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """p(class|image), (N, classes) float32 on the CPU, for images (N, C, H, W) in [0, 1]."""
        device = next(self.network.parameters()).device
        pieces = [torch.softmax(self.network(piece.to(device)).float(), 1).cpu() for piece in images.split(1000)]
        return torch.cat(pieces)


@dataclass(frozen=True)
class ClassReport:
    """The classes of some images, as the classifier sees them.

    ``counts`` has one number per class; ``present`` is how many classes have at least a fifth of an equal share (2% of
    ten classes); ``entropy`` is that of the shares in nats, at most log(classes); ``mean_confidence`` the mean of the
    highest probability, low for images that are of no class; ``test_accuracy`` how far the classifier can be trusted.
    """

    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    present: int
    entropy: float
    mean_confidence: float
    test_accuracy: float

    @property
    def effective_classes(self) -> float:
        """exp(entropy): the number of equally frequent classes that have this entropy."""
        return math.exp(self.entropy)


def train_classifier(train: ImageDataset, test: ImageDataset, *, seed: int = 0, steps: int = 1500) -> Classifier:
    """An MLP of two hidden layers, trained on ``train`` with Adam; a pure function of data and seed on the CPU.

    About 97% on MNIST and on scikit-learn's digits after a few seconds. It draws nothing from torch's generators.

    Raises:
        ValueError: a data set without labels, or two that differ in image shape or classes; ``steps`` below 1.
    """
    if train.labels is None or test.labels is None:
        raise ValueError(f"the data set must have labels, but {train.name} has none")
    if (train.image_shape, train.class_names) != (test.image_shape, test.class_names):
        raise ValueError(f"train and test must have the same image shape and classes, got {train!r} and {test!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _mlp(math.prod(train.image_shape), train.num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    key = Key(seed).fold_in(_CLASSIFIER)
    with torch.enable_grad():
        for step in range(steps):
            # The rounded product is below len(train): uniform() is at most 1 - 2^-24, and the sum is in float64.
            draws = ops.uniform((_BATCH,), key.fold_in(step), dtype=torch.float64)
            batch = train.batch((draws * len(train)).long())
            assert batch.labels is not None
            loss = F.cross_entropy(network(batch.images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier = Classifier(network.eval(), train.class_names, math.nan)
    found = classifier.probabilities(test.batch(torch.arange(len(test))).images).argmax(1)
    return Classifier(network, train.class_names, (found == test.labels).double().mean().item())


def class_report(classifier: Classifier, images: Tensor) -> ClassReport:
    """The classes of ``images`` (N, C, H, W) in [0, 1].

    Raises:
        ValueError: no image.
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    confidence, classes = classifier.probabilities(images).max(1)
    counts = classes.bincount(minlength=len(classifier.class_names))
    return ClassReport(
        classifier.class_names,
        tuple(counts.tolist()),
        int((counts >= _PRESENT * len(images) / len(counts)).sum()),
        _entropy(counts.tolist()),
        confidence.double().mean().item(),
        classifier.test_accuracy,
    )


@torch.no_grad()
def classify_samples(
    model: GenerativeModel, classifier: Classifier, key: Key, *, n: int = 1000, batch_size: int = 250
) -> ClassReport:
    """The classes of ``n`` samples of a model, in evaluation mode; sample ``i`` is that of ``key.samples(i)``.

    Raises:
        ValueError: ``n`` or ``batch_size`` below 1.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    with evaluating(model):
        pieces = [
            model.sample(min(batch_size, n - first), key.samples(first)).cpu() for first in range(0, n, batch_size)
        ]
    return class_report(classifier, torch.cat(pieces))


def _mlp(pixels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(),
        nn.Linear(_HIDDEN, classes),
    )  # fmt: skip


def _entropy(counts: Sequence[int]) -> float:
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)
