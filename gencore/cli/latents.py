"""``gencore reconstruct``, ``interpolate`` and ``traverse``: pictures of what a latent code holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from gencore import ops, pictures, plugins
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
        codes, ends = _encoded(loaded.model, chosen_images(images, 2 * rows, seed).images)[0], f"{images.split} images"
    else:
        rows = rows or _PAIRS
        codes, ends = _prior(loaded.model, 2 * rows, seed), "samples"
    path_of_codes = torch.cat([spherical(a, b, columns) for a, b in zip(codes[:rows], codes[rows:], strict=True)])
    pictures.save(pictures.grid(_decoded(loaded.model, path_of_codes), columns), path)
    report(path, f"{rows} interpolations between {ends}, {loaded.title}")


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
    pairs = torch.stack((originals, _decoded(model, _encoded(model, originals)[0]).cpu()))
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
    shape = _latent_shape(model)
    size = torch.Size(shape).numel()
    rows = min(rows, size)
    order, labels = list(range(size)), [f"z{i}" for i in range(rows)]
    if images is not None and isinstance(model, Autoencodes):
        mu, logvar = _encoded(model, chosen_images(images, min(len(images), 512), seed).images)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).mean(0)
        order = divergence.argsort(descending=True, stable=True).tolist()
        labels = [f"z{i}  {float(divergence[i]):.2f} nats" for i in order[:rows]]
        base = mu[0]
    else:
        base = _prior(model, 1, seed)[0]
    codes = base.flatten().expand(rows, columns, size).clone()
    for row, dimension in enumerate(order[:rows]):
        codes[row, :, dimension] = torch.linspace(-_REACH, _REACH, columns)
    return pictures.grid(_decoded(model, codes.reshape(-1, *shape)), columns, labels)


def spherical(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """``steps`` codes from ``a`` to ``b`` along the arc between their directions, their lengths in between.

    A straight line between codes of a normal prior passes through shorter ones than the prior ever draws.
    """
    t = torch.linspace(0, 1, steps, device=a.device).reshape(-1, *[1] * a.dim())
    length_a, length_b = a.norm().clamp(min=1e-12), b.norm().clamp(min=1e-12)
    cosine = (a * b).sum() / (length_a * length_b)
    if abs(float(cosine)) > 0.9999:
        return a + t * (b - a)
    angle = cosine.acos()
    direction = (torch.sin((1 - t) * angle) * a / length_a + torch.sin(t * angle) * b / length_b) / torch.sin(angle)
    return direction * (length_a + t * (length_b - length_a))


def _prior(model: GenerativeModel, n: int, seed: int) -> Tensor:
    return ops.normal((n, *_latent_shape(model)), Key(seed), device=model.device)


def _latent_shape(model: GenerativeModel) -> tuple[int, ...]:
    if not isinstance(model, HasLatents):
        raise UserError("this model has no latent code")
    return model.latent_shape


@torch.no_grad()
def _encoded(model: GenerativeModel, images: Tensor) -> tuple[Tensor, Tensor]:
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
def _decoded(model: GenerativeModel, codes: Tensor) -> Tensor:
    if not isinstance(model, HasLatents):
        raise UserError("this model has no latent code")
    with plugins.blamed(model.plugin_name, "decode()"):
        return checked_images(model.decode(codes), len(codes), model.spec)
