"""``gencore arithmetic``: sums of mean latents, such as those of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gencore import metrics, pictures
from gencore.cli.common import (
    DataName,
    DataSettings,
    DeviceOption,
    Loaded,
    RunFolder,
    Seed,
    UseEma,
    UserError,
    check_output,
    chosen_images,
    load,
    load_images,
    only_data,
    picture_file,
    report,
)
from gencore.cli.latents import check_latents, decoded, drawn, encoded
from gencore.data import NamedDataset
from gencore.models.base import Autoencodes
from gencore.models.latents import Term, class_means, parsed
from gencore.text import listed

# Samples to choose from, and images or samples that the classes' means are taken of.
_SHOWN, _OF_CLASSES = 64, 2000
# Images that are encoded at a time.
_PIECE = 250
# A sample is one of a class if the classifier is surer than this.
_CONFIDENT = 0.9
# Samples are numbered below this.
_MOST = 1 << 20


def command(
    directory: RunFolder,
    expression: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help='Such as "3 - 1 + 7" for mean latents of classes, or "s12,s15 - s1,s4 + s2" for those of samples.  '
            "[default: draw samples with their numbers, to choose from]",
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("-n", min=1, max=100_000, help="Images, or samples, that the classes' means are taken of.")
    ] = _OF_CLASSES,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", parser=picture_file, help="[default: DIR/arithmetic.png]")
    ] = None,
    data_name: DataName = None,
    settings: DataSettings = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Add and subtract latents, and draw what each term and the result is decoded to.

    The latents of a class are the mean codes of its test images if the model has an encoder; else those of the samples
    that a classifier of the data set takes for the class.
    """
    loaded = load(directory, ema, device)
    path = out or loaded.directory / "arithmetic.png"
    check_output(path)
    check_latents(loaded.model)
    of_data = only_data(settings)
    if expression is None:
        images = decoded(loaded.model, drawn(loaded.model, _SHOWN, seed))
        pictures.save(pictures.grid(images, captions=[f"s{i}" for i in range(_SHOWN)]), path)
        report(path, f"samples of seed {seed} with their numbers, {loaded.title}")
        return
    try:
        terms = parsed(expression, loaded.spec.class_names)
    except ValueError as error:
        raise UserError(f"--expression: {str(error).removeprefix('expression ')}") from error
    named = list(dict.fromkeys(name for term in terms for name in term.names))
    classes = [name for name in named if name in loaded.spec.class_names]
    samples = {name: _number(name, loaded) for name in named if name not in classes}
    latents = _of_samples(loaded, samples, seed)
    if classes:
        latents.update(_of_classes(loaded, classes, n, seed, data_name, of_data))
    means = [torch.stack([latents[name] for name in term.names]).mean(0) for term in terms]
    result = sum(term.sign * mean for term, mean in zip(terms, means, strict=True))
    assert isinstance(result, Tensor)
    images = decoded(loaded.model, torch.stack([*means, result]))
    captions = [_caption(term, first=i == 0) for i, term in enumerate(terms)] + ["= result"]
    pictures.save(pictures.grid(images, len(images), captions=captions), path)
    report(path, f"{expression.strip()}, {loaded.title}")


def _caption(term: Term, *, first: bool) -> str:
    return str(term) if first or term.sign < 0 else f"+ {term}"


def _number(name: str, loaded: Loaded) -> int:
    """The number of a sample that is called s and that number."""
    if name[:1] == "s" and name[1:].isdecimal() and int(name[1:]) < _MOST:
        return int(name[1:])
    names = loaded.spec.class_names
    there = f"the classes are {listed(map(repr, names))}" if names else "the data set has no classes"
    raise UserError(f"--expression takes classes and samples such as s12, got {name!r}; {there}")


def _of_samples(loaded: Loaded, samples: dict[str, int], seed: int) -> dict[str, Tensor]:
    if not samples:
        return {}
    every = drawn(loaded.model, max(samples.values()) + 1, seed)
    return {name: every[number] for name, number in samples.items()}


def _of_classes(
    loaded: Loaded, classes: Sequence[str], n: int, seed: int, data_name: str | None, of_data: dict[str, str]
) -> dict[str, Tensor]:
    """The mean latents of classes, by name."""
    model, names = loaded.model, loaded.spec.class_names
    test = load_images(loaded, data_name, "test", of_data, or_train=True)
    if test.spec.class_names != names:
        raise UserError(f"data set {test.name} has other classes than {loaded.checkpoint.run.data}")
    if isinstance(model, Autoencodes):
        labels, latents = _coded(loaded, test, n, seed)
        what = f"{len(latents)} {test.split} images of {test.name}"
    else:
        latents = drawn(model, n, seed)
        labels = _recognised(loaded, latents, test, seed, data_name, of_data)
        what = f"{n} samples"
    means, counts = class_means(latents, labels, len(names))
    for name in classes:
        if counts[names.index(name)] == 0:
            raise UserError(f"--expression: none of {what} is of class {name!r}; -n takes more of them")
    return {name: means[names.index(name)] for name in classes}


def _coded(loaded: Loaded, images: NamedDataset, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classes of some images, and the means of their codes."""
    batch, classes = chosen_images(images, n, seed, at_most=True), images.spec.first("class")
    assert classes is not None
    labels = batch.conditions[classes.name]
    assert isinstance(labels, Tensor)
    return labels, torch.cat([encoded(loaded.model, part)[0] for part in batch.images.split(_PIECE)])


def _recognised(
    loaded: Loaded, latents: Tensor, test: NamedDataset, seed: int, data_name: str | None, of_data: dict[str, str]
) -> Tensor:
    """The classes that a classifier sees in what latents are decoded to; -1 where it is not sure."""
    train = load_images(loaded, data_name, "train", of_data)
    try:
        classifier = metrics.train_classifier(train, test, seed=seed)
    except ValueError as error:
        raise UserError(f"data set {test.name}: {error}") from error
    images = torch.cat([decoded(loaded.model, part) for part in latents.split(_PIECE)])
    confidence, labels = classifier.probabilities(images).max(1)
    return torch.where(confidence > _CONFIDENT, labels, -1)
