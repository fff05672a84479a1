"""``gencore edit``: hides a part of test images and has the model fill it in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

from gencore import pictures, plugins
from gencore.cli.common import (
    Asked,
    BatchSize,
    DataName,
    DeviceOption,
    Labels,
    Prompt,
    PromptFile,
    RunFolder,
    SamplingSettings,
    Seed,
    UseEma,
    UserError,
    apart,
    check_guidance,
    check_output,
    chosen_images,
    conditions_of,
    load,
    load_images,
    picture_file,
    report,
    sampling_of,
)
from gencore.config import ConfigError
from gencore.data import DataError
from gencore.data.images import read_image
from gencore.models.base import NO_CONDITIONS, GenerativeModel, SamplingConfig, checked_images
from gencore.noise import Key
from gencore.spec import Conditions

MASKS = ("center", "left", "right", "top", "bottom", "border")
_HIDDEN_GRAY = 0.5
_IMAGES = 8
# Folded into the seed, so that fills share no noise with what is measured or sampled of the same seed.
_FILLS = int.from_bytes(b"fills", "big")


def command(
    directory: RunFolder,
    mask: Annotated[
        str,
        typer.Option(
            metavar="|".join((*MASKS, "FILE.png")),
            help="What is hidden; border leaves the middle half. A file hides what is white in it.",
        ),
    ] = "center",
    n: Annotated[
        int | None, typer.Option("-n", min=1, max=64, help=f"How many test images.  [default: {_IMAGES}, or all]")
    ] = None,
    fills: Annotated[int, typer.Option(min=1, max=64, help="How many times each is filled in.")] = 3,
    labels: Labels = None,
    prompt: Prompt = None,
    prompts: PromptFile = None,
    settings: SamplingSettings = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", parser=picture_file, help="[default: DIR/edits.png]")
    ] = None,
    data_name: DataName = None,
    batch_size: BatchSize = 256,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw test images, the same with a part hidden, and what the model fills in there; the rest stays as it is."""
    asked, (of_sampling, of_data) = Asked(labels, prompt, prompts), apart(settings)
    loaded = load(directory, ema, device)
    check_guidance(loaded, of_sampling, asked)
    sampling = sampling_of(loaded, of_sampling)
    if not loaded.model.can_edit:
        raise UserError(f"model {loaded.checkpoint.run.model} cannot edit images")
    path = out or loaded.directory / "edits.png"
    check_output(path)
    known = known_pixels(mask, loaded.spec.image_shape)
    dataset = load_images(loaded, data_name, "test", of_data, or_train=True)
    batch = chosen_images(dataset, n or _IMAGES, seed, at_most=n is None)
    images, conditions = batch.images, conditions_of(asked, len(batch), loaded, of_data, batch.conditions)
    picture = edit_picture(
        loaded.model, images, known, fills, Key(seed), batch_size, conditions=conditions, sampling=sampling
    )
    pictures.save(picture, path)
    report(path, f"{len(images)} {dataset.split} images with a part filled in {fills} times, {loaded.title}")


def known_pixels(mask: str, shape: tuple[int, int, int]) -> Tensor:
    """(1, 1, H, W) float32: 0 where ``mask`` (one of ``MASKS``, or a picture's file) hides an image, else 1."""
    _, height, width = shape
    hidden = torch.zeros(height, width, dtype=torch.bool)
    middle = (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4))
    if mask == "center":
        hidden[middle] = True
    elif mask == "border":
        hidden[:] = True
        hidden[middle] = False
    elif mask in ("top", "bottom"):
        hidden[slice(height // 2) if mask == "top" else slice(height // 2, height)] = True
    elif mask in ("left", "right"):
        hidden[:, slice(width // 2) if mask == "left" else slice(width // 2, width)] = True
    else:
        hidden = _white(Path(mask), height, width)
    if not hidden.any():
        raise UserError(f"--mask {mask} hides nothing of an image of {width}x{height} pixels (width x height)")
    return (~hidden).float()[None, None]


def edit_picture(
    model: GenerativeModel,
    images: Tensor,
    known: Tensor,
    fills: int,
    key: Key,
    batch_size: int = 256,
    *,
    conditions: Conditions = NO_CONDITIONS,
    sampling: SamplingConfig | None = None,
) -> Image.Image:
    """Rows of images, the same with the hidden part gray, and ``fills`` of what the model makes of it."""
    hidden = torch.where(known.bool(), images, _HIDDEN_GRAY)
    key = key.fold_in(_FILLS)
    filled = [
        edited(model, images, known, key.fold_in(fill), batch_size, conditions=conditions, sampling=sampling)
        for fill in range(fills)
    ]
    pictures.check_finite(torch.cat(filled), "fills")
    row_labels = ["image", "known", *["model"] * fills]
    return pictures.grid(torch.cat([images, hidden, *filled]), len(images), row_labels)


def edited(
    model: GenerativeModel,
    images: Tensor,
    known: Tensor,
    key: Key,
    batch_size: int,
    *,
    conditions: Conditions = NO_CONDITIONS,
    sampling: SamplingConfig | None = None,
) -> Tensor:
    """The images filled in, on the CPU; image ``i`` has the noise of sample id ``i`` of ``key``."""
    parts = []
    for first in range(0, len(images), batch_size):
        some = images[first : first + batch_size].to(model.device)
        chosen = {name: values[first : first + batch_size] for name, values in conditions.items()}
        options: dict[str, Any] = {"sampling": sampling, "progress": len(images) <= batch_size, "check_finite": True}
        with plugins.blamed(model.plugin_name, "edit()", ConfigError, FloatingPointError):
            filled = model.edit(some, known.to(model.device), key.samples(first), chosen, **options)
            parts.append(checked_images(filled, len(some), model.spec))
    return torch.cat(parts)


def _white(path: Path, height: int, width: int) -> Tensor:
    """Where the picture is white, or rather so, (height, width) bool."""
    if not path.is_file():
        raise UserError(f"--mask must be one of {', '.join(MASKS)} or a picture, and there is no file {path}")
    try:
        gray = read_image(path)
    except DataError as error:
        raise UserError(f"--mask {error}") from error
    if gray.shape[1:] != (height, width):
        theirs, ours = f"{gray.shape[2]}x{gray.shape[1]}", f"{width}x{height}"
        raise UserError(f"--mask {path} has {theirs} pixels, the model's images have {ours} (width x height)")
    return gray[0] >= 128
