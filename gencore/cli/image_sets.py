"""Sets of images as users name them: a run, a data set, a folder, an archive; and what sees features in them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from gencore import data, metrics, ops
from gencore.cli.common import Loaded, UserError, apart, folder_or_file, load, load_images, read_images, sampling_of
from gencore.data import MissingSplitError, NamedDataset, Split
from gencore.data.conditions import conditions_for
from gencore.metrics import FeatureExtractor, cache, efficientnet, features_of, inception
from gencore.noise import Key
from gencore.text import counted
from gencore.train.trainer import Device, choose_device

Features = Literal["classifier", "efficientnet", "inception"]
Part = Literal["train", "test", "all"]

FeaturesOption = Annotated[
    Features | None,
    typer.Option(
        "--features",
        help="By whose features: efficientnet (ImageNet), inception (FID), classifier (trained on the data's classes).",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", parser=folder_or_file, help="The weights of efficientnet or inception."),
]

# Folded into the seed: which images are taken, and the samples.
_CHOICE, _SAMPLES = int.from_bytes(b"chosen", "big"), int.from_bytes(b"measured", "big")


@dataclass(frozen=True)
class ImageSet:
    """Images that can be gone through, batch by batch.

    Attributes:
        title: as it stands in a table.
        shape: channels, height, width.
        count: how many there are.
        batches: gives them from the first on, in [0, 1], rounded to 8 bits as those of a file are.
        fingerprint: of their content; None for what is made anew.
        splits: the data sets that they are of; none for samples.
    """

    title: str
    shape: tuple[int, ...]
    count: int
    batches: Callable[[], Iterator[Tensor]]
    fingerprint: str | None = None
    splits: tuple[NamedDataset, ...] = ()

    def features(self, extractor: FeatureExtractor, *, keep: bool = False) -> Tensor:
        """What the extractor sees in them; with ``keep``, it is kept in the cache from one command to the next."""

        def compute() -> Tensor:
            try:
                return features_of(extractor, self.batches(), self.count, name=self.title, progress=True)
            except ValueError as error:
                raise UserError(str(error)) from error

        if not keep or self.fingerprint is None:
            return compute()
        return cache.cached((self.fingerprint, extractor.fingerprint), compute)


class Choice(NamedTuple):
    """How images are chosen, and samples drawn."""

    n: int | None
    part: Part = "all"
    settings: Sequence[str] = ()
    seed: int = 0
    batch_size: int = 250
    ema: bool | None = None
    device: Device = "auto"


def opened(text: str, choice: Choice) -> ImageSet:
    """The images that ``text`` names: a run's folder, ``NAME[:PATH]`` of a data set, a folder or zip archive of images,
    or an npz file as ``gencore sample`` writes it.

    Raises:
        UserError: it names nothing.
    """
    name, _, _ = text.partition(":")
    of_sampling, of_data = apart(list(choice.settings))
    if name in data.DATASETS.names():
        parts: list[Split] = ["train", "test"] if choice.part == "all" else [choice.part]
        return _of_datasets(_read(text, parts, of_data), text, choice)
    path = Path(text)
    if (path / "run.json").is_file() or (path / "checkpoint.json").is_file():
        return _of_run(load(path, choice.ema, choice.device), of_sampling, choice)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _of_arrays(path, choice)
    if path.is_dir() or (path.is_file() and zipfile.is_zipfile(path)):
        return _of_datasets(_read(f"images:{text}", ["train", "test"], of_data), text, choice)
    what = "is no run, folder or archive of images, npz file or data set" if path.exists() else "is not there"
    raise UserError(f"{text} {what}; data sets are {', '.join(data.DATASETS.names())}, as NAME or NAME:PATH")


def _read(name: str, parts: Sequence[Split], settings: dict[str, str]) -> list[NamedDataset]:
    found: list[NamedDataset] = []
    missing: MissingSplitError | None = None
    for part in parts:
        try:
            found.append(read_images(name, part, settings))
        except MissingSplitError as error:
            missing = error
    if not found and missing is not None:
        raise missing
    return found


def of_dataset(dataset: NamedDataset, n: int | None, seed: int) -> ImageSet:
    """``n`` images of a data set, chosen by the seed, or all."""
    return _of_datasets([dataset], f"{dataset.name} {dataset.split}", Choice(n, dataset.split, seed=seed))


def _of_datasets(splits: list[NamedDataset], text: str, choice: Choice) -> ImageSet:
    total = sum(map(len, splits))
    rows = torch.arange(total)
    if choice.n is not None and choice.n < total:
        order = ops.uniform((total, 1), Key(choice.seed).fold_in(_CHOICE))[:, 0].argsort(stable=True)
        rows = order[: choice.n].sort().values
    digest = hashlib.blake2b(digest_size=16)
    for each in splits:
        digest.update(f"{each.fingerprint} {len(each)}".encode())
    digest.update(rows.numpy().astype("<i8").tobytes())

    def batches() -> Iterator[Tensor]:
        first = 0
        for each in splits:
            mine = rows[(rows >= first) & (rows < first + len(each))] - first
            for indices in mine.split(choice.batch_size):
                yield each.batch(indices).images
            first += len(each)

    part = f" {splits[0].split}" if len(splits) == 1 and text.partition(":")[0] in data.DATASETS.names() else ""
    shape = splits[0].spec.image_shape
    return ImageSet(f"{text}{part}", shape, len(rows), batches, digest.hexdigest(), tuple(splits))


def _of_run(loaded: Loaded, settings: list[str], choice: Choice) -> ImageSet:
    model, n = loaded.model, 1000 if choice.n is None else choice.n
    if not model.can_sample:
        raise UserError(f"model {loaded.checkpoint.run.model} generates no images")
    sampling = sampling_of(loaded, settings)
    conditions = {}
    if any(need == "required" for need in model.takes.values()):
        images = load_images(loaded, None, "test", or_train=True)
        conditions = conditions_for(model, images, n, required=True)

    def batches() -> Iterator[Tensor]:
        key = Key(choice.seed).fold_in(_SAMPLES)
        options = {"n": n, "batch_size": choice.batch_size, "conditions": conditions, "sampling": sampling}
        for images in metrics.sample_batches(model, key, **options):  # type: ignore[arg-type]
            # A NaN stays one.
            yield (images.float().clamp(0, 1) * 255).round() / 255

    return ImageSet(str(loaded.directory), model.spec.image_shape, n, batches)


def _of_arrays(path: Path, choice: Choice) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels = arrays["arr_0"]
    except KeyError:
        raise UserError(f"{path} must hold the images as arr_0, as gencore sample --format npz writes them") from None
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz file: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.size == 0 or not 1 <= pixels.shape[3] <= 4:
        raise UserError(
            f"{path}: arr_0 must be uint8 of shape (N, H, W, C) with 1 to 4 channels, got {pixels.dtype} {pixels.shape}"
        )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    dataset = data.ImageDataset(path.name, "test", images)
    return _of_datasets([dataset], str(path), choice)


def check_same_shape(real: ImageSet, fake: ImageSet) -> None:
    """Raises UserError unless both have images of one shape: features of resized images are other features."""
    if real.shape != fake.shape:
        ours, theirs = ("x".join(map(str, each.shape)) for each in (real, fake))
        raise UserError(
            f"{real.title} has images of {ours}, {fake.title} of {theirs}; they must be of one size "
            "(--set data.size=N resizes those of folders)"
        )


def extractor_of(
    name: Features | None, weights: Path | None, device: Device, splits: Sequence[NamedDataset], seed: int
) -> FeatureExtractor:
    """What is to see the features: the one that is asked for, or the first that is there.

    Args:
        splits: data sets that a classifier can be trained on: one of training, one of test images.

    Raises:
        MissingWeightsError: its weights are not there, or none are and the images have no classes.
        UserError: a classifier is asked for and the images have no classes, or one split alone.
    """
    place = choose_device(device)
    if name == "classifier" and weights is not None:
        raise UserError("--weights: the classifier is trained on the images, and takes no weights")
    train, test = (next((each for each in splits if each.split == split), None) for split in ("train", "test"))
    has_classes = all(each is not None and each.spec.num_classes > 0 for each in (train, test))
    if name is None:
        name = "efficientnet" if efficientnet.is_installed() or not has_classes else "classifier"
    if name == "inception":
        return inception.InceptionV3(weights, place)
    if name == "efficientnet":
        return metrics.EfficientNetLite0(weights, place)
    if not has_classes or train is None or test is None:
        raise UserError("--features classifier needs real images with classes, and both of their splits")
    try:
        return metrics.ClassifierFeatures(metrics.train_classifier(train, test, seed=seed))
    except ValueError as error:
        raise UserError(str(error)) from error


def too_few(extractor: FeatureExtractor, *sets: ImageSet) -> list[str]:
    """Notes of sets that are too small for a covariance of full rank."""
    few = [f"{each.title} has {counted(each.count, 'image')}" for each in sets if each.count <= extractor.size]
    if not few:
        return []
    return [
        f"a covariance of {extractor.size:,} features needs more than {extractor.size:,} images, and "
        f"{' and '.join(few)}: compare Fréchet distances of equally many images only"
    ]
