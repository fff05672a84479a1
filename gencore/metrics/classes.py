"""Which classes do a model's samples show? A classifier of the data set tells, and so finds a collapse to a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gencore import ops, plugins
from gencore.config import ConfigError
from gencore.data import NamedDataset
from gencore.models.base import NO_CONDITIONS, GenerativeModel, SamplingConfig, checked_images
from gencore.noise import Key
from gencore.processes import ALONE, Processes
from gencore.progress import Progress
from gencore.spec import Batch, Condition, Conditions

_HIDDEN, _BATCH = 256, 128
# Images that are looked at together.
_PIECE = 1000
# A class counts as present with a fifth of the share it would have if all were equally frequent: 2% of ten classes.
_PRESENT = 0.2
# A sample counts as recognised when the classifier is surer of it than this.
_CONFIDENT = 0.9
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
        return torch.softmax(self._in_pieces(self.network, images), 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, (N, D) float32 on the CPU, for images (N, C, H, W) in [0, 1].

        Raises:
            TypeError: the network has no method ``features`` that gives it.
        """
        features = getattr(self.network, "features", None)
        if not callable(features):
            raise TypeError(f"network must have a method features, and {type(self.network).__name__} has none")
        return self._in_pieces(features, images)

    def _in_pieces(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        return torch.cat([function(piece.to(device)).float().cpu() for piece in images.split(_PIECE)])


@dataclass(frozen=True)
class ClassReport:
    """The classes of some images, as the classifier sees them.

    ``counts`` has one number per class; ``present`` is how many classes have at least a fifth of an equal share (2% of
    ten classes); ``entropy`` is that of the shares in nats, at most log(classes); ``mean_confidence`` the mean of the
    highest probability, low for images that are of no class; ``confident`` the share of images where that is above 0.9;
    ``test_accuracy`` how far the classifier can be trusted. Images that are not finite are counted in no class, and
    ``mean_confidence`` is NaN then.
    """

    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    present: int
    entropy: float
    mean_confidence: float
    confident: float
    test_accuracy: float

    @property
    def effective_classes(self) -> float:
        """exp(entropy): the number of equally frequent classes that have this entropy."""
        return math.exp(self.entropy)


def train_classifier(train: NamedDataset, test: NamedDataset, *, seed: int = 0, steps: int = 1500) -> Classifier:
    """An MLP of two hidden layers, trained on ``train`` with Adam; a pure function of data and seed on the CPU.

    About 97% on MNIST and on scikit-learn's digits after a few seconds. It draws nothing from torch's generators.

    Raises:
        ValueError: a data set without classes, or two that differ in image shape or classes; ``steps`` below 1.
    """
    classes, others = train.spec.first("class"), test.spec.first("class")
    if classes is None or others is None:
        unlabelled = train if classes is None else test
        raise ValueError(f"the data set must have classes, but {unlabelled.name} has none")
    if train.spec.image_shape != test.spec.image_shape or classes != others:
        raise ValueError(f"train and test must have the same image shape and classes, got {train!r} and {test!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _MLP(math.prod(train.spec.image_shape), len(classes.names))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    key = Key(seed).fold_in(_CLASSIFIER)
    with torch.enable_grad():
        for step in range(steps):
            # The rounded product is below len(train): uniform() is at most 1 - 2^-24, and the sum is in float64.
            draws = ops.uniform((_BATCH,), key.fold_in(step), dtype=torch.float64)
            batch = train.batch((draws * len(train)).long())
            loss = F.cross_entropy(network(batch.images), _labels(batch, classes))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier = Classifier(network.eval(), classes.names, math.nan)
    right = 0
    for indices in torch.arange(len(test)).split(_PIECE):
        batch = test.batch(indices)
        right += int((classifier.probabilities(batch.images).argmax(1) == _labels(batch, classes)).sum())
    return Classifier(network, classes.names, right / len(test))


def _labels(batch: Batch, classes: Condition) -> Tensor:
    labels = batch.conditions[classes.name]
    assert isinstance(labels, Tensor)
    return labels


def class_report(classifier: Classifier, images: Tensor) -> ClassReport:
    """The classes of ``images`` (N, C, H, W) in [0, 1].

    Raises:
        ValueError: no image.
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    confidence, classes = classifier.probabilities(images).max(1)
    counts = classes[confidence.isfinite()].bincount(minlength=len(classifier.class_names))
    return ClassReport(
        classifier.class_names,
        tuple(counts.tolist()),
        int((counts >= _PRESENT * len(images) / len(counts)).sum()),
        _entropy(counts.tolist()),
        confidence.double().mean().item(),
        (confidence > _CONFIDENT).double().mean().item(),
        classifier.test_accuracy,
    )


def conditional_accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of ``images`` (N, C, H, W) in [0, 1] that the classifier takes for the class in ``labels`` (N,).

    Raises:
        ValueError: no image, or another number of labels.
    """
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be one for each of at least one image, got {len(images)} images and {labels.shape}"
        )
    confidence, classes = classifier.probabilities(images).max(1)
    # The largest of NaNs would be the first class.
    return (confidence.isfinite() & (classes == labels.cpu())).double().mean().item()


def draw_samples(
    model: GenerativeModel,
    key: Key,
    *,
    n: int = 1000,
    batch_size: int = 250,
    conditions: Conditions = NO_CONDITIONS,
    sampling: SamplingConfig | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
) -> Tensor:
    """``n`` samples of a model in evaluation mode, (n, C, H, W) on the CPU; sample ``i`` is that of ``key.samples(i)``.

    Args:
        batch_size: samples computed at a time; changes rounding at most.
        conditions: of the ``n`` samples, see :meth:`GenerativeModel.sample`.
        sampling: how, in place of the model's own.
        processes: those that share the work; each gets all samples.
        progress: whether to show how far it is, on stderr.

    Raises:
        ValueError: ``n`` or ``batch_size`` below 1, another number of conditions.
        PluginError: the model's ``generate`` raises an error, or gives what are no ``n`` images of its shape.
    """
    options: dict[str, Any] = {"sampling": sampling, "processes": processes, "progress": progress}
    return torch.cat(list(sample_batches(model, key, n=n, batch_size=batch_size, conditions=conditions, **options)))


def sample_batches(
    model: GenerativeModel,
    key: Key,
    *,
    n: int,
    batch_size: int = 250,
    conditions: Conditions = NO_CONDITIONS,
    sampling: SamplingConfig | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
    check_finite: bool = False,
) -> Iterator[Tensor]:
    """The samples of :func:`draw_samples`, ``batch_size`` of each process at a time, computed when they are asked for.

    Args:
        check_finite: see :class:`gencore.models.Draw`.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    for name, values in conditions.items():
        if len(values) != n:
            raise ValueError(f"conditions[{name!r}] must be one for each of {n} samples, got {len(values)}")
    block = batch_size * processes.size

    def part(first: int, last: int) -> Tensor:
        chosen = {name: values[first:last] for name, values in conditions.items()}
        what = f"sample() of samples {first} to {last - 1}"
        # By these a model refuses settings of sampling, and says where it met what is not finite.
        with plugins.blamed(model.plugin_name, what, ConfigError, FloatingPointError):
            # Of one batch the model says how far it is, of several this does.
            shown = progress and n <= block
            options: dict[str, Any] = {"sampling": sampling, "progress": shown, "check_finite": check_finite}
            images = model.sample(last - first, key.samples(first), chosen, **options)
            return checked_images(images, last - first, model.spec)

    def batches() -> Iterator[Tensor]:
        with Progress(n, name="sampling", unit="image", shown=progress and n > block) as shown:
            for start in range(0, n, block):
                count = min(block, n - start)
                first, last = (start + row for row in processes.rows(count))
                mine = part(first, last) if last > first else torch.empty(0, *model.spec.image_shape)
                yield torch.cat(processes.gathered(mine)) if processes.size > 1 else mine
                shown.update(count)

    return batches()


class _MLP(nn.Module):
    """(N, C, H, W) -> (N, classes) logits; ``features`` is what the last layer sees."""

    def __init__(self, pixels: int, classes: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU()
        )
        self.head = nn.Linear(_HIDDEN, classes)

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.hidden(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def _entropy(counts: Sequence[int]) -> float:
    total = sum(counts)
    if total == 0:
        return math.nan
    return -sum(count / total * math.log(count / total) for count in counts if count)
