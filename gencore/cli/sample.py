"""``gencore sample``: images from a trained model, as a grid, as files of one image each, or as one array."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from gencore import metrics, pictures
from gencore.cli.common import (
    Asked,
    BatchSize,
    ConditionData,
    DeviceOption,
    Labels,
    Loaded,
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
    conditions_of,
    folder_or_file,
    load,
    report,
    sampling_of,
)
from gencore.files import writing
from gencore.models.base import SamplingConfig
from gencore.noise import Key
from gencore.spec import Conditions

# More are no picture that anybody could look at.
_MOST_IN_GRID = 4096
_SUFFIXES = {"grid": ("", ".png"), "npz": ("", ".npz")}
# DIR/samples/ has the pictures of train.sample_every.
_DEFAULTS = {"grid": "samples.png", "png": "images", "npz": "samples.npz"}


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
            metavar="PATH", parser=folder_or_file, help="[default: DIR/samples.png, DIR/images/ or DIR/samples.npz]"
        ),
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    prompts: PromptFile = None,
    source: ConditionData = None,
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
    asked, (of_sampling, of_data) = Asked(labels, prompt, prompts, source), apart(settings)
    if of_data and source is None:
        raise UserError("--set data.NAME: sample reads a data set with --from only")
    loaded = load(directory, ema, device)
    check_guidance(loaded, of_sampling, asked)
    sampling = sampling_of(loaded, of_sampling)
    if not loaded.model.can_sample:
        raise UserError(f"model {loaded.checkpoint.run.model} cannot sample")
    if form == "png" and loaded.spec.image_shape[0] not in pictures.MODES:
        channels = loaded.spec.image_shape[0]
        raise UserError(f"--format png takes images of 1 to 4 channels, the model's have {channels}; npz takes them")
    conditions = conditions_of(asked, n, loaded, of_data)
    path = out or loaded.directory / _DEFAULTS[form]
    loaded.processes.by_first(lambda: check_output(path, form == "png"))
    batches = _batches(loaded, n, seed, batch_size, conditions, sampling)
    if not loaded.processes.is_first:
        # The first process has the images of all.
        for _ in batches:
            pass
        return
    if form == "grid":
        pictures.save(pictures.grid(torch.cat(list(batches))), path)
    elif form == "png":
        _write_files(path, batches, n)
    else:
        classes = next((values for values in conditions.values() if _is_classes(values)), None)
        _write_array(path, batches, n, loaded.spec.image_shape, classes)
    report(path, f"{n:,} samples of {loaded.title}")


def _is_classes(values: Tensor | Sequence[str]) -> bool:
    return isinstance(values, Tensor) and values.dim() == 1


def _batches(
    loaded: Loaded, n: int, seed: int, batch_size: int, conditions: Conditions, sampling: SamplingConfig | None
) -> Iterator[Tensor]:
    for images in metrics.sample_batches(
        loaded.model,
        Key(seed),
        n=n,
        batch_size=batch_size,
        conditions=conditions,
        sampling=sampling,
        progress=loaded.processes.is_first,
        check_finite=True,
        processes=loaded.processes,
    ):
        pictures.check_finite(images, "samples")
        yield images


def _write_files(path: Path, batches: Iterator[Tensor], n: int) -> None:
    """A PNG for each image, called by its number, in a folder that is new or empty; all of them or none."""
    new = not path.exists()
    digits = max(6, len(str(n - 1)))
    temporary = path / f".{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        number = 0
        for images in batches:
            for image in pictures.pixels(images):
                pictures.picture(image).save(temporary / f"{number:0{digits}}.png")
                number += 1
        for file in sorted(temporary.iterdir()):
            file.rename(path / file.name)
    except BaseException as error:
        shutil.rmtree(path if new else temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    temporary.rmdir()


def _write_array(path: Path, batches: Iterator[Tensor], n: int, shape: tuple[int, int, int], classes: Any) -> None:
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
