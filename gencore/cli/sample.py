"""``gencore sample``: images from a trained model, as a grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gencore.cli import pictures
from gencore.cli.common import BatchSize, DeviceOption, RunFolder, Seed, UseEma, UserError, load, picture_file
from gencore.models.base import GenerativeModel
from gencore.noise import Key


def command(
    directory: RunFolder,
    n: Annotated[int, typer.Option("-n", min=1, max=4096, help="How many images.")] = 64,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", parser=picture_file, help="[default: DIR/samples.png]")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="0,1,...", help="Classes to sample, in turns, for a model with classes.")
    ] = None,
    batch_size: BatchSize = 256,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw a grid of samples; the same images for any --batch-size, up to rounding."""
    loaded = load(directory, ema, device)
    if labels is not None and not loaded.model.conditional:
        raise UserError(f"--labels: model {loaded.checkpoint.run.model} samples without classes")
    classes = None if labels is None else _classes(labels, n, loaded.config.num_classes)
    images = draw(loaded.model, n, Key(seed), batch_size, classes)
    path = out or loaded.directory / "samples.png"
    pictures.save(pictures.grid(images, columns=math.ceil(math.sqrt(n))), path)
    print(f"{path}: {n} samples of {loaded.title}")


@torch.no_grad()
def draw(model: GenerativeModel, n: int, key: Key, batch_size: int, labels: Tensor | None = None) -> Tensor:
    """``n`` samples on the CPU, ``batch_size`` at a time; sample ``i`` has the noise of sample id ``i`` of ``key``."""
    parts = []
    for first in range(0, n, batch_size):
        count = min(batch_size, n - first)
        chosen = None if labels is None else labels[first : first + count].to(model.device)
        parts.append(model.sample(count, key.samples(first), chosen).cpu())
    return torch.cat(parts)


def _classes(text: str, n: int, num_classes: int) -> Tensor:
    if num_classes == 0:
        raise UserError("--labels: the model was trained on images without classes")
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels takes classes such as 0,1,2, got {text!r}") from None
    if not all(0 <= label < num_classes for label in classes):
        raise UserError(f"--labels must be from 0 to {num_classes - 1}, got {text}")
    return torch.tensor(classes).repeat(-(-n // len(classes)))[:n]
