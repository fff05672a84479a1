"""``gencore sample``: images from a trained model, as a grid, as files of one image each, or as one array."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from gencore import metrics
from gencore.cli import pictures
from gencore.cli.common import (
    BatchSize,
    DeviceOption,
    Labels,
    Loaded,
    RunFolder,
    SamplingSettings,
    Seed,
    UseEma,
    UserError,
    check_guidance,
    chosen_classes,
    folder_or_file,
    load,
    report,
)
from gencore.files import writing
from gencore.noise import Key

# More are no picture that anybody could look at.
_MOST_IN_GRID = 4096
_SUFFIXES = {"grid": ("", ".png"), "npz": ("", ".npz")}


def command(
    directory: RunFolder,
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 64,
    form: Annotated[
        Literal["grid", "png", "npz"],
        typer.Option(
            "--format",
            help="grid: one picture of all; png: a folder with a file for each; npz: one array, arr_0 (N, H, W, C) "
            "uint8, with arr_1 the labels, if any.",
        ),
    ] = "grid",
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", parser=folder_or_file, help="[default: DIR/samples.png, DIR/samples/ or DIR/samples.npz]"
        ),
    ] = None,
    labels: Labels = None,
    settings: SamplingSettings = None,
    batch_size: BatchSize = 256,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Draw samples; the same images for any --batch-size and --format, up to rounding."""
    if form == "grid" and n > _MOST_IN_GRID:
        raise UserError(f"-n must be at most {_MOST_IN_GRID} for a grid, got {n}; --format png or npz takes any number")
    if out is not None and form in _SUFFIXES and out.suffix.lower() not in _SUFFIXES[form]:
        raise UserError(f"--out must end in {_SUFFIXES[form][1]} with --format {form}, got a name in {out.suffix}")
    check_guidance(settings, labels)
    loaded = load(directory, ema, device, settings)
    classes = None if labels is None else chosen_classes(labels, n, loaded)
    loaded.model.check_finite = True
    batches = _batches(loaded, n, seed, batch_size, classes)
    if form == "grid":
        path = out or loaded.directory / "samples.png"
        pictures.save(pictures.grid(torch.cat(list(batches)), columns=math.ceil(math.sqrt(n))), path)
    elif form == "png":
        path = out or loaded.directory / "samples"
        _write_files(path, batches, n, loaded.config.image_shape)
    else:
        path = out or loaded.directory / "samples.npz"
        _write_array(path, batches, n, loaded.config.image_shape, classes)
    report(path, f"{n:,} samples of {loaded.title}")


def _batches(loaded: Loaded, n: int, seed: int, batch_size: int, classes: Tensor | None) -> Iterator[Tensor]:
    """The samples, batch by batch; how far they are is said of them all, or of the only batch by the model."""
    model = loaded.model
    model.progress &= n <= batch_size
    for images in metrics.sample_batches(model, Key(seed), n=n, batch_size=batch_size, labels=classes, progress=True):
        pictures.check_finite(images, "samples")
        yield images


def _write_files(path: Path, batches: Iterator[Tensor], n: int, shape: tuple[int, int, int]) -> None:
    """A folder with a PNG for each image, called by its number; the whole folder or nothing."""
    if shape[0] not in pictures.MODES:
        raise UserError(f"--format png takes images of 1 to 4 channels, the model's have {shape[0]}; npz takes them")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file, and the samples are files in a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is there and not empty; --out names another folder")
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")
    digits = max(6, len(str(n - 1)))
    temporary.mkdir(parents=True)
    try:
        number = 0
        for images in batches:
            for image in pictures.pixels(images):
                pictures.picture(image).save(temporary / f"{number:0{digits}}.png")
                number += 1
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_array(
    path: Path, batches: Iterator[Tensor], n: int, shape: tuple[int, int, int], classes: Tensor | None
) -> None:
    """What ``numpy.savez(path, images, labels)`` writes, with no more than a batch of the images in memory."""
    channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, channels)}
    with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for images in batches:
                member.write(pictures.pixels(images).permute(0, 2, 3, 1).numpy().tobytes())
        if classes is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, classes.numpy())
