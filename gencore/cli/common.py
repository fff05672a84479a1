"""What several commands share: their options, and the way from a folder to a model and its data."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO

import torch
import typer
from torch import Tensor

from gencore import data, ops, plugins
from gencore.config import Config, ConfigError, close_names
from gencore.data import DataError, ImageDataset, MissingSplitError, Split
from gencore.files import check_writable, is_output_stream
from gencore.models.base import GenerativeModel, ModelConfig
from gencore.noise import Key
from gencore.text import counted, listed, shown
from gencore.train.checkpoint import Checkpoint, Run, read, restore_model
from gencore.train.trainer import choose_device

# The notes that this command has shown.
_said: set[str] = set()


class UserError(Exception):
    """A mistake of the user's that no library knows as one; its message is the line that is shown."""


def begin() -> None:
    """Forgets what an earlier command of this process did."""
    _said.clear()


def folder_or_file(text: str | Path) -> Path:
    """A path as an option or argument gives it; the empty one would be the working directory."""
    if text == "":
        raise typer.BadParameter("must not be empty")
    return Path(text)


# What is learned where nothing is named.
DEFAULT_DATA = "digits"

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
DataSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="data.NAME=VALUE", help="How to read the images, such as data.size=64; repeatable."),
]
SamplingSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="How to sample, such as sampler=ddim or steps=50, or data.NAME; repeatable, see gencore list.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="Classes to sample, in turns, by name or number, for a model with classes."),
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
    model.progress = True
    if checkpoint.directory == directory and directory.resolve().parent.name == "checkpoints":
        # A checkpoint is removed when newer ones come; what belongs to the run is to stay.
        directory = directory.resolve().parents[1]
    return Loaded(model, checkpoint, directory)


def beside(path: Path) -> TextIO:
    """Where to print what is not to get into ``path``: stderr if that is stdout itself, else stdout."""
    return sys.stderr if is_output_stream(path, 1) else sys.stdout


def report(path: Path, text: str) -> None:
    """Prints what was written where."""
    print(one_line(f"{path}: {text}"), file=beside(path))


def check_output(path: Path, is_folder: bool = False) -> None:
    """Refuses a place where nothing can be written, before the work is done that would be lost.

    Args:
        is_folder: whether files are to be written into it, which it must not hold yet.
    """
    try:
        if not is_folder:
            check_writable(path)
        elif path.exists() and not path.is_dir():
            raise UserError(f"{path} is no folder; choose one with --out")
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"folder {path} is not empty; choose another one with --out")
        else:
            check_writable(path / "0")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another place with --out") from error


def one_line(text: str) -> str:
    """The text in one line, what a terminal would act on escaped."""
    return shown(re.sub(r"\s*\n\s*", " ", text.strip()))


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


def chosen_classes(text: str, n: int, loaded: Loaded) -> Tensor:
    """The classes of ``--labels``, in turns, (n,)."""
    num_classes = loaded.config.num_classes
    if not loaded.model.conditional:
        raise UserError(f"--labels: model {loaded.checkpoint.run.model} samples without classes")
    if num_classes == 0:
        raise UserError("--labels: the model was trained on images without classes")
    classes = _classes_of(text, loaded.checkpoint.run.class_names, num_classes)
    return torch.tensor(classes).repeat(-(-n // len(classes)))[:n]


def _classes_of(text: str, names: list[str], num_classes: int) -> list[int]:
    """The classes of a list with commas between names or numbers; a name may hold commas itself."""
    parts, classes, first = text.split(","), [], 0
    while first < len(parts):
        # The longest name that is spelled from here on.
        spelled = [(end, ",".join(parts[first:end])) for end in range(len(parts), first, -1)]
        spelled += [(end, name.strip()) for end, name in spelled]
        end, name = next(((end, name) for end, name in spelled if name in names), (first + 1, parts[first].strip()))
        classes.append(_class_of(name, names, num_classes))
        first = end
    return classes


def _class_of(name: str, names: list[str], num_classes: int) -> int:
    if name in names:
        return names.index(name)
    # Where a class is called by a number, numbers are names.
    numbers = not any(other.isdecimal() for other in names)
    if numbers and name.isdecimal() and len(name) < 10 and int(name) < num_classes:
        return int(name)
    close = [] if name.isdecimal() else close_names(name, names)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the classes are {listed(map(repr, names))}"
    what = f"names of classes or numbers from 0 to {num_classes - 1}" if numbers else "names of classes"
    raise UserError(f"--labels takes {what}, got {name!r}; {hint}")


def load_images(
    loaded: Loaded,
    name: str | None,
    split: Split,
    settings: dict[str, str] | None = None,
    *,
    or_train: bool = False,
) -> ImageDataset:
    """The images that the model was trained on, or others of the same shape.

    The settings of the data set are those of the training where it is of the same kind, with ``settings`` changed. With
    ``or_train``, training images stand in for a split that has none.
    """
    run = loaded.checkpoint.run
    of_data, name = data_settings(run, name, settings or {}), name or run.data
    try:
        images = read_images(name, split, of_data)
    except MissingSplitError as error:
        if not or_train:
            raise
        say([f"{error}; training images are shown"])
        images = read_images(name, "train", of_data)
    if images.image_shape != loaded.config.image_shape:
        ours, theirs = ("x".join(map(str, shape)) for shape in (loaded.config.image_shape, images.image_shape))
        raise UserError(f"the model makes images of {ours}, data set {images.name} has images of {theirs}")
    return images


def read_images(name: str, split: Split, settings: dict[str, Any]) -> ImageDataset:
    """A data set; what it has to say of its files is shown."""
    try:
        with data.showing_progress():
            images = data.load(name, split, settings)
    except DataError as error:
        path = name.partition(":")[2]
        if path and not Path(path).exists():
            message = f"{error}; if you moved the images, give their new place with --data"
            raise DataError(message, error.files) from error
        raise
    say(images.notes)
    return images


def say(notes: Iterable[str]) -> None:
    """Shows what a data set has to say of its files, each note once."""
    for note in notes:
        if note not in _said:
            _said.add(note)
            print(f"gencore: {one_line(note)}", file=sys.stderr)


def data_settings(
    saved: Run | None, name: str | None, settings: dict[str, str], others: Iterable[str] = ()
) -> dict[str, Any]:
    """The settings of the data set ``name`` (default: that of the run), as ``--set data.NAME=VALUE`` changes them.

    They begin with those of the run, if the data set is of the same kind.

    Args:
        others: faults found before, to be told with those found here, if there are any.

    Raises:
        ConfigError: with every fault, named as on the command line.
    """
    spec = name or (saved.data if saved else DEFAULT_DATA)
    same = saved is not None and spec.partition(":")[0] == saved.data.partition(":")[0]
    kind = data.settings_type(spec)
    if kind is None:
        faults = [f"data.{key}: is not a setting; data set {spec.partition(':')[0]} has none" for key in settings]
    else:
        faults = []
        found = collect(kind, settings, saved.data_settings if saved and same else {}, "data.", faults)
    if faults:
        raise ConfigError("data", [*others, *faults])
    return {} if kind is None else found.to_dict()


def collect(
    config: type[Config],
    settings: dict[str, str],
    base: Any,
    prefix: str,
    faults: list[str],
    known: Iterable[str] | None = None,
) -> Any:
    """The configuration; its faults go to ``faults``, so that those of model, trainer and data are told together.

    Args:
        prefix: what the settings' names begin with on the command line.
        known: all names of the command line that one may have been meant as.
    """
    known = [prefix + name for name in config.offered()] if known is None else known
    try:
        return config.from_strings(settings, base, prefix=prefix, known=known)
    except ConfigError as error:
        faults += error.faults
        return None


def chosen_images(images: ImageDataset, n: int, seed: int, *, at_most: bool = False) -> Tensor:
    """``n`` of the images, chosen by the seed; with ``at_most``, all if there are less."""
    if n > len(images) and not at_most:
        there = counted(len(images), f"{images.split} image")
        raise UserError(f"data set {images.name} has {there}; {n} were requested")
    return first_in_random_order(images, n, Key(seed))


def first_in_random_order(images: ImageDataset, n: int, key: Key) -> Tensor:
    """``n`` of the images, or all if there are less, in an order that the key decides."""
    order = ops.uniform((len(images), 1), key)[:, 0].argsort(stable=True)
    return images.batch(order[:n]).images


def model_names() -> list[str]:
    """The names of all model plugins."""
    return [entry.name for entry in plugins.list_models()]


def pairs(settings: list[str]) -> dict[str, str]:
    """The values of ``--set`` options by name."""
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UserError(f"--set takes name=value, got {setting!r}")
        if name in found:
            raise UserError(f"--set {name} is given twice")
        found[name] = value
    return found


class Settings(NamedTuple):
    """``--set`` options apart, those of the trainer (``train.``) and of the data set (``data.``) without prefix."""

    model: dict[str, str]
    train: dict[str, str]
    data: dict[str, str]


def apart(settings: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """``--set`` options of a trained model apart: those of how it samples, and those of the data set (``data.``)."""
    of_data = parsed_settings(settings or []).data
    return [setting for setting in settings or [] if not setting.strip().startswith("data.")], of_data


def only_data(settings: list[str] | None) -> dict[str, str]:
    """``--set`` options of a command that takes those of the data set alone."""
    others, of_data = apart(settings)
    if others:
        raise UserError(f"--set {others[0].partition('=')[0]}: this command takes settings of the data set, data.NAME")
    return of_data


def parsed_settings(settings: list[str]) -> Settings:
    """The ``--set`` options by what they set."""
    parsed = Settings({}, {}, {})
    for name, value in pairs(settings).items():
        group, dot, key = name.partition(".")
        if dot and group in ("train", "data"):
            getattr(parsed, group)[key] = value
        else:
            parsed.model[name] = value
    return parsed
