"""``gencore probe`` and ``gencore map``: what the codes of an encoder hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gencore import metrics, pictures, plugins
from gencore.cli.common import (
    BatchSize,
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
    print_table,
    report,
)
from gencore.data import NamedDataset
from gencore.models.base import Autoencodes, checked_images
from gencore.models.linear import principal_components
from gencore.spec import Batch

# Images that are enough to tell codes apart, and few enough for a logistic regression of their pixels.
_IMAGES = 5000
# Images along each side of the plane.
_SIDE = 20


def probe(
    directory: RunFolder,
    n: Annotated[
        int, typer.Option("-n", min=2, help="Training images of the classifiers, and test images, at most.")
    ] = _IMAGES,
    seed: Seed = 0,
    data_name: DataName = None,
    settings: DataSettings = None,
    batch_size: BatchSize = 250,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure how well a linear classifier tells classes by codes, by as many principal components and by pixels."""
    loaded = load(directory, ema, device)
    parts = []
    for split in ("train", "test"):
        images = load_images(loaded, data_name, split, only_data(settings))
        parts.append((images, _labelled(images, n, seed)))
    codes = [_codes(loaded, batch, batch_size) for _, batch in parts]
    pixels = [batch.images.flatten(1) for _, batch in parts]
    size = codes[0].shape[1]
    found = principal_components(lambda: [pixels[0]], min(size, len(pixels[0]) - 1, pixels[0].shape[1]))
    components = [(values.double() - found.mean) @ found.directions.T for values in pixels]
    labels = [_labels(images, batch) for images, batch in parts]
    rows: list[tuple[str, ...]] = [("linear classifier of", "values", "accuracy on test images")]
    for name, (known, asked) in (
        (f"codes of {loaded.title}", codes),
        ("principal components", components),
        ("pixels", pixels),
    ):
        try:
            accuracy = metrics.linear_probe(known, labels[0], asked, labels[1])
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        rows.append((name, str(known.shape[1]), f"{accuracy:.3f}"))
    print_table(rows)


def latent_map(
    directory: RunFolder,
    n: Annotated[int, typer.Option("-n", min=2, help="Test images, at most.")] = 2000,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(metavar="PNG", parser=picture_file, help="[default: DIR/map.png]")] = None,
    data_name: DataName = None,
    settings: DataSettings = None,
    batch_size: BatchSize = 250,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw the codes of test images in the plane, coloured by class, beside what the model decodes over the plane.

    Of more than two dimensions, the plane is that of the codes' two largest principal components.
    """
    loaded = load(directory, ema, device)
    path = out or loaded.directory / "map.png"
    check_output(path)
    images = load_images(loaded, data_name, "test", only_data(settings), or_train=True)
    batch = chosen_images(images, n, seed, at_most=True)
    codes = _codes(loaded, batch, batch_size).double()
    if codes.shape[1] < 2:
        raise UserError(
            f"the model's code must have at least two dimensions to be drawn in a plane, has {codes.shape[1]}"
        )
    found = principal_components(lambda: [codes], 2) if codes.shape[1] > 2 else None
    centre = codes.new_zeros(2) if found is None else found.mean
    axes = torch.eye(2, dtype=torch.float64) if found is None else found.directions
    places = (codes - centre) @ axes.T
    reach = places.abs().quantile(0.99, dim=0).max().item()
    steps = torch.linspace(-reach, reach, _SIDE, dtype=torch.float64)
    # Row by row from the top left, as the picture shows them.
    down, across = torch.meshgrid(steps.flip(0), steps, indexing="ij")
    corners = torch.stack((across, down), -1).flatten(0, 1)
    decoded = _decoded(loaded, centre + corners @ axes, batch_size)
    labels = _labels(images, batch) if images.spec.num_classes else None
    picture = pictures.latent_map(places, labels, images.spec.class_names, decoded, reach, loaded.title)
    pictures.save(picture, path)
    report(path, f"codes of {len(batch)} images, {loaded.title}")


def _labelled(images: NamedDataset, n: int, seed: int) -> Batch:
    if images.spec.num_classes == 0:
        raise UserError(f"data set {images.name} has no classes, which the classifiers are to tell")
    return chosen_images(images, n, seed, at_most=True)


def _labels(images: NamedDataset, batch: Batch) -> Tensor:
    classes = images.spec.first("class")
    assert classes is not None
    labels = batch.conditions[classes.name]
    assert isinstance(labels, Tensor)
    return labels


@torch.no_grad()
def _codes(loaded: Loaded, batch: Batch, batch_size: int) -> Tensor:
    """The means of the images' codes, (N, D) float32 on the CPU."""
    model = loaded.model
    if not isinstance(model, Autoencodes):
        raise UserError("this model has no encoder, so that images have no code")
    with plugins.blamed(model.plugin_name, "encode()"):
        parts = [model.encode(part.to(model.device))[0].flatten(1) for part in batch.images.split(batch_size)]
        return torch.cat(parts).float().cpu()


@torch.no_grad()
def _decoded(loaded: Loaded, codes: Tensor, batch_size: int) -> Tensor:
    """The images of codes (N, D), (N, C, H, W) on the CPU."""
    model = loaded.model
    assert isinstance(model, Autoencodes)
    with plugins.blamed(model.plugin_name, "decode()"):
        shaped = codes.float().unflatten(1, model.latent_shape).to(model.device)
        return torch.cat(
            [checked_images(model.decode(part), len(part), model.spec) for part in shaped.split(batch_size)]
        )
