"""``gencore sample``: images from a trained model, as a grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from gencore import metrics
from gencore.cli import pictures
from gencore.cli.common import (
    BatchSize,
    DeviceOption,
    Labels,
    RunFolder,
    SamplingSettings,
    Seed,
    UseEma,
    check_finite,
    check_guidance,
    chosen_classes,
    load,
    picture_file,
)
from gencore.noise import Key


def command(
    directory: RunFolder,
    n: Annotated[int, typer.Option("-n", min=1, max=4096, help="How many images.")] = 64,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", parser=picture_file, help="[default: DIR/samples.png]")
    ] = None,
    labels: Labels = None,
    settings: SamplingSettings = None,
    batch_size: BatchSize = 256,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw a grid of samples; the same images for any --batch-size, up to rounding."""
    check_guidance(settings, labels)
    loaded = load(directory, ema, device, settings)
    classes = None if labels is None else chosen_classes(labels, n, loaded)
    loaded.model.check_finite = True
    images = metrics.draw_samples(loaded.model, Key(seed), n=n, batch_size=batch_size, labels=classes)
    check_finite(images, "samples")
    path = out or loaded.directory / "samples.png"
    pictures.save(pictures.grid(images, columns=math.ceil(math.sqrt(n))), path)
    print(f"{path}: {n} samples of {loaded.title}")
