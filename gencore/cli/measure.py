"""``gencore measure``: one set of images against another."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from gencore import ops
from gencore.cli import image_sets
from gencore.cli.common import (
    BatchSize,
    DeviceOption,
    SamplingSettings,
    Seed,
    UseEma,
    UserError,
    apart,
    beside,
    check_output,
    folder_or_file,
    for_json,
    print_table,
    read_images,
    say,
)
from gencore.cli.image_sets import Choice, FeaturesOption, ImageSet, Part, WeightsOption
from gencore.data import DATASETS, MissingSplitError, NamedDataset, Split
from gencore.files import write_atomically
from gencore.metrics import FeatureExtractor, Figure, compare
from gencore.metrics.report import LEAST_IMAGES
from gencore.noise import Key
from gencore.text import counted

# Folded into the seed: the halves of the real images, and the bootstrap.
_HALVES, _BOOTSTRAP = 1, 2

_WHAT = "a run, a data set NAME[:PATH], a folder or zip archive of images, or an npz file"


def command(
    real: Annotated[str, typer.Argument(metavar="REAL", help=f"Real images: {_WHAT}.")],
    fake: Annotated[str, typer.Argument(metavar="FAKE", help=f"The images to measure: {_WHAT}.")],
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Images of FAKE.  [default: 1000 samples of a run, or all]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Images of REAL, chosen by the seed.  [default: all]")
    ] = None,
    part: Annotated[Part, typer.Option("--split", help="Of REAL and FAKE, where they are data sets.")] = "test",
    features: FeaturesOption = None,
    weights: WeightsOption = None,
    settings: SamplingSettings = None,
    replicates: Annotated[int, typer.Option(min=0, max=10_000, help="Of the bootstrap, for the intervals.")] = 20,
    seed: Seed = 0,
    batch_size: BatchSize = 250,
    keep: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep the features of REAL.")] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="JSON", parser=folder_or_file, help="Write the figures too.")
    ] = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure FAKE against REAL: Fréchet and kernel distance, precision and recall, density and coverage."""
    if out is not None:
        check_output(out)
    common: dict[str, Any] = {"settings": settings or (), "seed": seed, "batch_size": batch_size}
    common |= {"part": part, "ema": ema, "device": device}
    reals = image_sets.opened(real, Choice(limit, **common))
    fakes = image_sets.opened(fake, Choice(n, **common))
    image_sets.check_same_shape(reals, fakes)
    for each in (reals, fakes):
        if each.count < LEAST_IMAGES:
            have = counted(each.count, "image")
            raise UserError(f"{each.title} has {have}; these measures need at least {LEAST_IMAGES}")
    others = _other_split(real, part, apart(settings)[1])
    splits = [*reals.splits, *others]
    extractor = image_sets.extractor_of(features, weights, device, splits, seed)
    other = image_sets.of_dataset(others[0], fakes.count, seed) if others else None
    found = measured(extractor, reals, fakes, other, replicates, Key(seed), keep=keep)
    say(image_sets.too_few(extractor, reals, fakes))
    if out is not None:
        told = {"real": real, "fake": fake, "seed": seed, **found.to_dict()}
        write_atomically(out, json.dumps(told, indent=1, allow_nan=False) + "\n")
    title = f"{fakes.title} ({counted(fakes.count, 'image')}) against {reals.title} ({counted(reals.count, 'image')})"
    print(f"{title}, features of {extractor.name}", file=beside(out) if out else None)
    print_table(rows(found.figures, found.floor))
    if out is not None:
        print(str(out), file=beside(out))


@dataclasses.dataclass(frozen=True)
class Measured:
    """The figures, and how many images they are of.

    Attributes:
        floor: which real images have the figures that stand beside those of the samples.
    """

    features: str
    real_images: int
    images: int
    figures: Sequence[Figure]
    floor: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "features": self.features,
            "real_images": self.real_images,
            "images": self.images,
            "compared": self.floor,
            "figures": [for_json(each.to_dict()) for each in self.figures],
        }


def measured(
    extractor: FeatureExtractor,
    reals: ImageSet,
    fakes: ImageSet,
    other: ImageSet | None,
    replicates: int,
    key: Key,
    *,
    keep: bool,
) -> Measured:
    """The figures of ``fakes``, beside those of as many other real images: ``other``, or a part of ``reals``."""
    real, fake = reals.features(extractor, keep=keep), fakes.features(extractor)
    if other is not None:
        beyond = other.features(extractor, keep=keep)
        figures = compare(extractor, real, fake, beyond, replicates=replicates, key=key.fold_in(_BOOTSTRAP))
        return Measured(extractor.name, len(real), len(fake), figures, f"{len(beyond):,} of {other.title}")
    figures = compare(extractor, real, fake, replicates=replicates, key=key.fold_in(_BOOTSTRAP))
    rest, part = _parts(real, len(fake), key.fold_in(_HALVES))
    if len(part) < LEAST_IMAGES:
        return Measured(extractor.name, len(real), len(fake), figures, "")
    floor = {each.measure: each.estimate.value for each in compare(extractor, rest, part, replicates=0, key=key)}
    figures = [dataclasses.replace(each, real=floor[each.measure]) for each in figures]
    return Measured(extractor.name, len(real), len(fake), figures, f"{len(part):,} of REAL against its others")


def _parts(features: Tensor, count: int, key: Key) -> tuple[Tensor, Tensor]:
    """Features of the real images in two: as many as there are samples, at most half, and the others."""
    count = min(count, len(features) // 2)
    order = ops.uniform((len(features), 1), key)[:, 0].argsort(stable=True)
    return features[order[count:]], features[order[:count]]


def _other_split(name: str, part: Part, settings: dict[str, str]) -> list[NamedDataset]:
    """The split of REAL that is not measured against, where it is a data set that has one."""
    if part == "all" or name.partition(":")[0] not in DATASETS.names():
        return []
    other: Split = "train" if part == "test" else "test"
    try:
        return [read_images(name, other, settings)]
    except MissingSplitError:
        return []


def rows(figures: Sequence[Figure], floor: str) -> list[tuple[str, ...]]:
    """The figures as a table, its first row the names of the columns."""
    table: list[tuple[str, ...]] = [("", "value", "95% interval", floor, "better")]
    for each in figures:
        low, high = each.estimate.interval
        interval = f"{_number(low)} to {_number(high)}" if math.isfinite(low) else ""
        beside_it = "" if each.real is None else _number(each.real)
        table.append((each.name, _number(each.estimate.value), interval, beside_it, each.better))
    return table


def _number(value: float) -> str:
    """With four digits, three of them behind the point at most where it is large."""
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"
