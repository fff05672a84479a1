"""``gencore neighbours``: are samples copies of training images?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gencore import pictures
from gencore.cli import image_sets
from gencore.cli.common import (
    DataName,
    DeviceOption,
    RunFolder,
    SamplingSettings,
    Seed,
    UseEma,
    UserError,
    apart,
    check_output,
    first_in_random_order,
    load,
    load_images,
    picture_file,
    report,
    sampling_of,
)
from gencore.cli.image_sets import FeaturesOption, ImageSet, WeightsOption
from gencore.data import MissingSplitError, NamedDataset
from gencore.data.conditions import conditions_for
from gencore.metrics import FeatureExtractor, Neighbours, draw_samples, nearest, nearest_in
from gencore.noise import Key

# Test images whose distances stand beside those of the samples: more than are drawn, for a median.
_BESIDE = 200
# Folded into the seed.
_SAMPLES, _TEST = 1, 2


def command(
    directory: RunFolder,
    n: Annotated[int, typer.Option("-n", min=1, max=64, help="How many samples.")] = 8,
    features: FeaturesOption = None,
    weights: WeightsOption = None,
    settings: SamplingSettings = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", parser=picture_file, help="[default: DIR/neighbours.png]")
    ] = None,
    data_name: DataName = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw samples above the training images that are nearest to them, in pixels and in features, with distances."""
    of_sampling, of_data = apart(settings)
    loaded = load(directory, ema, device)
    model, sampling = loaded.model, sampling_of(loaded, of_sampling)
    path = out or loaded.directory / "neighbours.png"
    check_output(path)
    if not model.can_sample:
        raise UserError(f"model {loaded.checkpoint.run.model} generates no images")
    train = load_images(loaded, data_name, "train", of_data)
    try:
        test: NamedDataset | None = load_images(loaded, data_name, "test", of_data)
    except MissingSplitError:
        test = None
    splits = [train] if test is None else [train, test]
    extractor = image_sets.extractor_of(features, weights, device, splits, seed)
    conditions = conditions_for(model, test or train, n, required=True)
    samples = draw_samples(
        model, Key(seed).fold_in(_SAMPLES), n=n, conditions=conditions, sampling=sampling, progress=True
    ).cpu()
    pictures.check_finite(samples, "samples")
    reals = image_sets.of_dataset(train, None, seed)
    in_pixels, in_features = found(reals, samples, extractor)
    pictures.save(picture(train, samples, in_pixels, in_features, extractor.name), path)
    report(path, f"samples and the training images nearest to them, {loaded.title}")
    if test is not None:
        others = first_in_random_order(test, _BESIDE, Key(seed).fold_in(_TEST)).images
        for line in _beside(found(reals, others, extractor), (in_pixels, in_features), len(others), extractor.name):
            print(line)


def found(reals: ImageSet, images: Tensor, extractor: FeatureExtractor) -> tuple[Neighbours, Neighbours]:
    """The nearest of the real images to each of ``images``, in pixels and in features."""

    def pixels() -> Iterator[Tensor]:
        for batch in reals.batches():
            yield batch.flatten(1)

    in_pixels = nearest_in(images.flatten(1), pixels())
    return in_pixels, nearest(extractor(images), reals.features(extractor, keep=True))


def picture(train: NamedDataset, samples: Tensor, in_pixels: Neighbours, in_features: Neighbours, features: str) -> Any:
    """Three rows: samples, the nearest images in pixels, those in features; the distance below each."""
    rows, captions = [samples], [""] * len(samples)
    for near in (in_pixels, in_features):
        rows.append(train.batch(near.indices[:, 0]).images)
        captions += [f"{distance:.3g}" for distance in near.distances[:, 0].tolist()]
    labels = ["samples", "nearest in pixels", f"in features ({features})"]
    return pictures.grid(torch.cat(rows), len(samples), labels, captions=captions)


def _beside(
    of_test: tuple[Neighbours, Neighbours], of_samples: tuple[Neighbours, Neighbours], n: int, features: str
) -> list[str]:
    """How far samples are from training images, and how far test images are, which are no copies."""
    lines = []
    for name, theirs, ours in zip(("pixels", f"features ({features})"), of_test, of_samples, strict=True):
        middle, theirs_middle = (each.distances[:, 0].median().item() for each in (ours, theirs))
        lines.append(
            f"  distance to the nearest training image in {name}, median: {middle:.4g}  "
            f"({n} test images: {theirs_middle:.4g}; copies are much nearer)"
        )
    return lines
