"""``gencore project``: the latents whose images are nearest to given images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from gencore import pictures, plugins
from gencore.cli.common import (
    DataSettings,
    DeviceOption,
    Loaded,
    RunFolder,
    Seed,
    UseEma,
    UserError,
    beside,
    check_output,
    chosen_images,
    load,
    load_images,
    one_line,
    only_data,
    picture_file,
)
from gencore.cli.latents import check_latents
from gencore.data.images import read_image
from gencore.files import writing
from gencore.models import latents
from gencore.models.base import Autoencodes
from gencore.noise import Key

_IMAGES = 8


def command(
    directory: RunFolder,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME[:PATH]|PICTURE",
            help="Test images of a data set, or one picture's file.  [default: what the run was trained on]",
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, max=512, help=f"How many test images.  [default: {_IMAGES}, or all]")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, max=1_000_000, help="Steps of the search.")] = 300,
    rate: Annotated[float, typer.Option(min=1e-9, max=1e3, help="The first learning rate of the search.")] = 0.05,
    candidates: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Samples to start from, if the model has no encoder.")
    ] = 1024,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG", parser=picture_file, help="The picture; latents go beside it.  [default: DIR/projection.png]"
        ),
    ] = None,
    settings: DataSettings = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Search the latents whose images are nearest to given ones, by the mean squared difference of pixels.

    The picture has the images, what the search starts with, and its results. The .npz beside it has the arrays latents,
    distances, start and start_distances.
    """
    loaded = load(directory, ema, device)
    path = out or loaded.directory / "projection.png"
    arrays = path.with_suffix(".npz")
    for each in (path, arrays):
        check_output(each)
    model = loaded.model
    check_latents(model)
    images, what = _images(loaded, source, n, seed, only_data(settings))
    with plugins.blamed(model.plugin_name, "encode() or decode()"):
        found = latents.project(
            model,
            images.to(model.device),
            Key(seed),
            steps=steps,
            learning_rate=rate,
            candidates=candidates,
            progress=True,
        )
    rows = torch.cat([images, found.start_images.cpu().float(), found.images.cpu().float()])
    pictures.save(pictures.grid(rows, len(images), ["image", "start", "result"]), path)
    with writing(arrays) as file:
        names = ("latents", "distances", "start", "start_distances")
        np.savez(file, **{name: getattr(found, name).cpu().numpy() for name in names})
    began = "the encoder's codes" if isinstance(model, Autoencodes) else f"the best of {candidates} samples"
    before, after = found.start_distances.mean().item(), found.distances.mean().item()
    said = [
        f"{path}: {what} projected, {loaded.title}",
        f"  mean squared difference: {before:.5f} with {began}, {after:.5f} after {steps} steps",
        f"{arrays}: latents",
    ]
    print(*(line if line[0] == " " else one_line(line) for line in said), sep="\n", file=beside(path))


def _images(
    loaded: Loaded, source: str | None, n: int | None, seed: int, of_data: dict[str, str]
) -> tuple[Tensor, str]:
    """The images (B, C, H, W) in [0, 1], and what they are."""
    if source is not None and Path(source).is_file():
        if n not in (None, 1) or of_data:
            raise UserError(f"--from {source} is one picture, which -n and --set data.NAME are not for")
        return _picture(Path(source), loaded.spec.image_shape), "a picture"
    if source is not None and Path(source).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
        raise UserError(f"--from: there is no file {source}")
    images = load_images(loaded, source, "test", of_data, or_train=True)
    chosen = chosen_images(images, n or _IMAGES, seed, at_most=n is None).images
    return chosen, f"{len(chosen)} {images.split} images of {images.name}"


def _picture(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One picture as an image of the model: the middle of a square one of its size."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"--from takes pictures for images of 1 or 3 channels, the model's have {channels}")
    pixels = read_image(path, channels, height if height == width else None)
    if pixels.shape != shape:
        theirs, ours = f"{pixels.shape[2]}x{pixels.shape[1]}", f"{width}x{height}"
        raise UserError(f"--from {path} has {theirs} pixels, the model's images have {ours} (width x height)")
    return pixels[None] / 255
