"""``gencore reconstruct``, ``interpolate`` and ``traverse``: pictures of what a latent code holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from gencore import pictures, plugins
from gencore.cli.common import (
    DataName,
    DataSettings,
    DeviceOption,
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
from gencore.data import NamedDataset
from gencore.models.base import Autoencodes, GenerativeModel, HasLatents, checked_images
from gencore.models.latents import PathKind, information, latent_shape, path_between, prior, traversal
from gencore.noise import Key

Out = Annotated[
    Path | None,
    typer.Option(metavar="PNG", parser=picture_file, help="[default: a file in DIR named after the command]"),
]
# How far a traversal goes to each side, in standard deviations of the prior.
_REACH = 2.5
# What is drawn where nothing else is asked for, if there are as many images.
_IMAGES, _PAIRS = 16, 8


def reconstruct(
    directory: RunFolder,
    n: Annotated[
        int | None, typer.Option("-n", min=1, max=512, help=f"How many test images.  [default: {_IMAGES}, or all]")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    data_name: DataName = None,
    settings: DataSettings = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw test images above their reconstructions by the model (of the mean of their code)."""
    loaded = load(directory, ema, device)
    path = out or loaded.directory / "reconstructions.png"
    check_output(path)
    images = load_images(loaded, data_name, "test", only_data(settings), or_train=True)
    pictures.save(reconstruction_picture(loaded.model, images, n, seed), path)
    report(path, f"{images.split} images and their reconstructions, {loaded.title}")


def interpolate(
    directory: RunFolder,
    rows: Annotated[
        int | None, typer.Option(min=1, max=64, help=f"How many pairs of ends.  [default: {_PAIRS}, or all]")
    ] = None,
    columns: Annotated[int, typer.Option(min=2, max=64, help="Images from end to end.")] = 10,
    kind: Annotated[
        PathKind, typer.Option("--path", help="Along a straight line, or an arc, which keeps the lengths of the codes.")
    ] = "spherical",
    seed: Seed = 0,
    out: Out = None,
    data_name: DataName = None,
    settings: DataSettings = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw images between pairs of test images, or between pairs of samples if the model has no encoder."""
    loaded = load(directory, ema, device)
    path = out or loaded.directory / "interpolations.png"
    check_output(path)
    if isinstance(loaded.model, Autoencodes):
        images = load_images(loaded, data_name, "test", only_data(settings), or_train=True)
        if len(images) < 2:
            raise UserError(f"an interpolation needs 2 {images.split} images; data set {images.name} has 1")
        rows = min(_PAIRS, len(images) // 2) if rows is None else rows
        codes, ends = encoded(loaded.model, chosen_images(images, 2 * rows, seed).images)[0], f"{images.split} images"
    else:
        rows = rows or _PAIRS
        codes, ends = drawn(loaded.model, 2 * rows, seed), "samples"
    paths = [path_between(a, b, columns, kind) for a, b in zip(codes[:rows], codes[rows:], strict=True)]
    pictures.save(pictures.grid(decoded(loaded.model, torch.cat(paths)), columns), path)
    report(path, f"{rows} {kind} interpolations between {ends}, {loaded.title}")


def traverse(
    directory: RunFolder,
    rows: Annotated[int, typer.Option(min=1, max=64, help="How many dimensions of the code.")] = 10,
    columns: Annotated[int, typer.Option(min=2, max=64, help="Values of each dimension.")] = 11,
    seed: Seed = 0,
    out: Out = None,
    data_name: DataName = None,
    settings: DataSettings = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw what each dimension of the code does, the most informative first if the model has an encoder."""
    loaded = load(directory, ema, device)
    path = out or loaded.directory / "traversal.png"
    check_output(path)
    images = None
    if isinstance(loaded.model, Autoencodes):
        images = load_images(loaded, data_name, "test", only_data(settings), or_train=True)
    pictures.save(traversal_picture(loaded.model, images, rows, columns, seed), path)
    report(path, f"dimensions of the code from -{_REACH} to {_REACH}, {loaded.title}")


def reconstruction_picture(model: GenerativeModel, images: NamedDataset, n: int | None, seed: int) -> Image.Image:
    """Rows of ``n`` images, each above the row of their reconstructions; with None, some or all."""
    originals = chosen_images(images, n or _IMAGES, seed, at_most=n is None).images
    pairs = torch.stack((originals, decoded(model, encoded(model, originals)[0]).cpu()))
    columns = min(len(originals), 8)
    rows = -(-len(originals) // columns)
    # An unfinished last row is filled with white, so that the images below it stay below their originals.
    blank = torch.ones(2, rows * columns - len(originals), *originals.shape[1:])
    pairs = torch.cat((pairs, blank), dim=1).unflatten(1, (rows, columns))
    labels = ["image", "model"] * rows
    return pictures.grid(pairs.transpose(0, 1).flatten(0, 2), columns, labels, rows_per_group=2)


def traversal_picture(
    model: GenerativeModel, images: NamedDataset | None, rows: int, columns: int, seed: int
) -> Image.Image:
    """A row for each dimension, its value rising from left to right, the others those of one code.

    With ``images`` and an encoder, that code is of one of them, and the rows are the dimensions with the largest
    mean KL divergence from the prior; without, it is drawn from the prior, and the rows are the first dimensions.
    """
    check_latents(model)
    size = torch.Size(latent_shape(model)).numel()
    rows = min(rows, size)
    order, labels = list(range(size)), [f"z{i}" for i in range(rows)]
    if images is not None and isinstance(model, Autoencodes):
        mu, logvar = encoded(model, chosen_images(images, min(len(images), 512), seed).images)
        divergence = information(mu, logvar)
        order = divergence.argsort(descending=True, stable=True).tolist()
        labels = [f"z{i}  {float(divergence[i]):.2f} nats" for i in order[:rows]]
        base = mu[0]
    else:
        base = drawn(model, 1, seed)[0]
    codes = traversal(base, order[:rows], torch.linspace(-_REACH, _REACH, columns))
    return pictures.grid(decoded(model, codes.flatten(0, 1)), columns, labels)


def drawn(model: GenerativeModel, n: int, seed: int) -> Tensor:
    """``n`` latents of the prior; latent ``i`` is that of sample ``i`` of the seed."""
    check_latents(model)
    return prior(model, n, Key(seed))


def check_latents(model: GenerativeModel) -> None:
    """Refuses a model without latents."""
    if not isinstance(model, HasLatents):
        raise UserError("this model has no latent code")


@torch.no_grad()
def encoded(model: GenerativeModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log-variances of the images' codes."""
    if not isinstance(model, Autoencodes):
        raise UserError("this model has no encoder, so it cannot reconstruct images")
    with plugins.blamed(model.plugin_name, "encode()"):
        mean, logvar = model.encode(images.to(model.device))
        shape = (len(images), *model.latent_shape)
        if mean.shape != shape or logvar.shape != shape:
            shapes = f"{tuple(mean.shape)} and {tuple(logvar.shape)}"
            raise ValueError(f"it must return two tensors of shape {shape}, got {shapes}")
    return mean, logvar


@torch.no_grad()
def decoded(model: GenerativeModel, codes: Tensor) -> Tensor:
    """The images of codes, on the CPU."""
    check_latents(model)
    assert isinstance(model, HasLatents)
    with plugins.blamed(model.plugin_name, "decode()"):
        return checked_images(model.decode(codes), len(codes), model.spec)
