"""What several commands share: their options, and the way from a folder to a model and its data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor

from gencore import data, ops
from gencore.data import ImageDataset, Split
from gencore.models.base import GenerativeModel, ModelConfig
from gencore.noise import Key
from gencore.train.checkpoint import Checkpoint, read, restore_model
from gencore.train.trainer import choose_device


class UserError(Exception):
    """A mistake of the user's that no library knows as one; its message is the line that is shown."""


def folder_or_file(text: str | Path) -> Path:
    """A path as an option or argument gives it; the empty one would be the working directory."""
    if text == "":
        raise typer.BadParameter("must not be empty")
    return Path(text)


DeviceName = Literal["auto", "cpu", "cuda"]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", parser=folder_or_file, help="The folder of a run, or of one of its checkpoints."),
]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Governs everything random.")]
BatchSize = Annotated[
    int, typer.Option(min=1, max=1 << 20, help="Images computed at a time; changes rounding at most.")
]
DeviceOption = Annotated[DeviceName, typer.Option(help="Where to compute.")]
UseEma = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="Take the moving average of the weights.  [default: if there is one]"),
]
DataName = Annotated[
    str | None, typer.Option("--data", metavar="NAME[:PATH]", help="Images.  [default: what the run was trained on]")
]
SamplingSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="How to sample, such as sampler=ddim or steps=50; repeatable, see gencore list.",
    ),
]
Labels = Annotated[
    str | None, typer.Option(metavar="0,1,...", help="Classes to sample, in turns, for a model with classes.")
]


@dataclass(frozen=True)
class Loaded:
    """A trained model, where it comes from, and where commands write what belongs to it."""

    model: GenerativeModel
    checkpoint: Checkpoint
    directory: Path

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def title(self) -> str:
        run = self.checkpoint.run
        return f"{run.model} on {run.data}, step {self.checkpoint.step}"


def picture_file(text: str | Path) -> Path:
    """Where a picture goes: :func:`folder_or_file`, of no other kind than PNG."""
    path = folder_or_file(text)
    if path.suffix.lower() not in ("", ".png"):
        raise typer.BadParameter(f"pictures are written as PNG, got a name in {path.suffix}")
    return path


def load(directory: Path, ema: bool | None, device: DeviceName, settings: list[str] | None = None) -> Loaded:
    """The trained model in ``directory``, which samples with ``settings`` and says on a terminal how far it is."""
    checkpoint = read(directory)
    model = restore_model(checkpoint, ema=ema, device=str(choose_device(device)))
    set_sampling(model, checkpoint.run.model, settings or [])
    model.progress = sys.stderr.isatty()
    if checkpoint.directory == directory and directory.resolve().parent.name == "checkpoints":
        # A checkpoint is removed when newer ones come; what belongs to the run is to stay.
        directory = directory.resolve().parents[1]
    return Loaded(model, checkpoint, directory)


def set_sampling(model: GenerativeModel, name: str, settings: list[str]) -> None:
    """Replaces what ``settings``, each name=value, name of the way in which the model samples."""
    if not settings:
        return
    if model.sampling is None:
        raise UserError(f"--set: model {name} has no settings of sampling")
    model.sampling = type(model.sampling).from_strings(pairs(settings), model.sampling.to_dict())


def check_guidance(settings: list[str] | None, labels: str | None) -> None:
    """Refuses settings of guidance, which have no effect on samples of no class."""
    for name in pairs(settings or []):
        if name.startswith("guidance_") and labels is None:
            raise UserError(f"--set {name}: guides to classes, and has no effect without --labels")


def check_finite(images: Tensor, what: str) -> None:
    """Refuses images that are none, for a model that does not notice by itself."""
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise UserError(f"{broken} of {len(images)} {what} are not finite, and no picture is written")


def chosen_classes(text: str, n: int, loaded: Loaded) -> Tensor:
    """The classes of ``--labels``, in turns, (n,)."""
    num_classes = loaded.config.num_classes
    if not loaded.model.conditional:
        raise UserError(f"--labels: model {loaded.checkpoint.run.model} samples without classes")
    if num_classes == 0:
        raise UserError("--labels: the model was trained on images without classes")
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels takes classes such as 0,1,2, got {text!r}") from None
    if not all(0 <= label < num_classes for label in classes):
        raise UserError(f"--labels must be from 0 to {num_classes - 1}, got {text}")
    return torch.tensor(classes).repeat(-(-n // len(classes)))[:n]


def load_images(loaded: Loaded, name: str | None, split: Split) -> ImageDataset:
    """The images that the model was trained on, or others of the same shape."""
    images = data.load(loaded.checkpoint.run.data if name is None else name, split)
    if images.image_shape != loaded.config.image_shape:
        ours, theirs = ("x".join(map(str, shape)) for shape in (loaded.config.image_shape, images.image_shape))
        raise UserError(f"the model makes images of {ours}, data set {images.name} has images of {theirs}")
    return images


def chosen_images(images: ImageDataset, n: int, seed: int) -> Tensor:
    """``n`` of the images, chosen by the seed."""
    if n > len(images):
        raise UserError(f"data set {images.name} has only {len(images)} {images.split} images, asked for are {n}")
    return first_in_random_order(images, n, Key(seed))


def first_in_random_order(images: ImageDataset, n: int, key: Key) -> Tensor:
    """``n`` of the images, or all if there are less, in an order that the key decides."""
    order = ops.uniform((len(images), 1), key)[:, 0].argsort(stable=True)
    return images.batch(order[:n]).images


def absolute_data_name(name: str) -> str:
    """``name:path`` with an absolute path, so that a run finds its images from anywhere."""
    plugin, colon, path = name.partition(":")
    return f"{plugin}:{Path(path).expanduser().resolve()}" if colon and path else name


def pairs(settings: list[str]) -> dict[str, str]:
    """The values of ``--set`` options by name."""
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes name=value, got {setting!r}")
        if name in found:
            raise UserError(f"--set {name} is given twice")
        found[name] = value
    return found


def parsed_settings(settings: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """``--set`` options apart: those of the model, and those of the trainer (``train.``, without that prefix)."""
    model: dict[str, str] = {}
    train: dict[str, str] = {}
    for name, value in pairs(settings).items():
        target, key = (train, name.removeprefix("train.")) if name.startswith("train.") else (model, name)
        target[key] = value
    return model, train
