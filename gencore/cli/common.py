"""What several commands share: their options, and the way from a folder to a model and its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from gencore import data
from gencore.data import ImageDataset, Split
from gencore.models.base import GenerativeModel, ModelConfig
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


def load(directory: Path, ema: bool | None, device: DeviceName) -> Loaded:
    """The trained model in ``directory``."""
    checkpoint = read(directory)
    model = restore_model(checkpoint, ema=ema, device=str(choose_device(device)))
    if checkpoint.directory == directory and directory.resolve().parent.name == "checkpoints":
        # A checkpoint is removed when newer ones come; what belongs to the run is to stay.
        directory = directory.resolve().parents[1]
    return Loaded(model, checkpoint, directory)


def load_images(loaded: Loaded, name: str | None, split: Split) -> ImageDataset:
    """The images that the model was trained on, or others of the same shape."""
    images = data.load(loaded.checkpoint.run.data if name is None else name, split)
    if images.image_shape != loaded.config.image_shape:
        ours, theirs = ("x".join(map(str, shape)) for shape in (loaded.config.image_shape, images.image_shape))
        raise UserError(f"the model makes images of {ours}, data set {images.name} has images of {theirs}")
    return images


def absolute_data_name(name: str) -> str:
    """``name:path`` with an absolute path, so that a run finds its images from anywhere."""
    plugin, colon, path = name.partition(":")
    return f"{plugin}:{Path(path).expanduser().resolve()}" if colon and path else name


def parsed_settings(pairs: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """``--set`` options apart: those of the model, and those of the trainer (``train.``, without that prefix)."""
    model: dict[str, str] = {}
    train: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes name=value, got {pair!r}")
        target, key = (train, name.removeprefix("train.")) if name.startswith("train.") else (model, name)
        if key in target:
            raise UserError(f"--set {name} is given twice")
        target[key] = value
    return model, train
