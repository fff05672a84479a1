"""What several commands share: their options, and the way from a folder to a model and its data."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO

import torch
import typer
from torch import Tensor

from gencore import data, ops
from gencore.config import close_names
from gencore.data import DataError, MissingSplitError, NamedDataset, Split
from gencore.data.conditions import conditions_for
from gencore.files import check_writable, is_output_stream
from gencore.models.base import NO_CONDITIONS, GenerativeModel, ModelConfig, SamplingConfig
from gencore.noise import Key
from gencore.plugins import MODELS
from gencore.processes import ALONE, Processes, join
from gencore.spec import Batch, Conditions, DataSpec
from gencore.text import counted, listed, shown
from gencore.train.checkpoint import Checkpoint, read, restore_model
from gencore.train.settings import Settings, data_settings
from gencore.train.settings import apart as split_settings
from gencore.train.trainer import Device, choose_device

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


RunFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", parser=folder_or_file, help="The folder of a run, or of one of its checkpoints."),
]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Governs everything random.")]
BatchSize = Annotated[
    int, typer.Option(min=1, max=1 << 20, help="Images computed at a time; changes rounding at most.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
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
Prompt = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="A text to sample, for a model with texts; repeatable.")
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", parser=folder_or_file, help="Texts, one a line.")
]
ConditionData = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="NAME[:PATH]", help="Take the conditions of these test images, such as the source images."
    ),
]


@dataclass(frozen=True)
class Loaded:
    """A trained model, where it comes from, and where commands write what belongs to it."""

    model: GenerativeModel
    checkpoint: Checkpoint
    directory: Path
    processes: Processes = ALONE

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def spec(self) -> DataSpec:
        return self.model.spec

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


def load(directory: Path, ema: bool | None, device: Device) -> Loaded:
    """The trained model in ``directory``."""
    checkpoint, place = read(directory), choose_device(device)
    model = restore_model(checkpoint, ema=ema, device=str(place))
    if checkpoint.directory == directory and directory.resolve().parent.name == "checkpoints":
        # A checkpoint is removed when newer ones come; what belongs to the run is to stay.
        directory = directory.resolve().parents[1]
    return Loaded(model, checkpoint, directory, join(place))


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


def for_json(value: Any) -> Any:
    """``value`` with null for the numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: for_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Prints rows of cells in columns, all but the last as wide as their widest cell; an empty one takes no place."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False) if width]
        print("  ".join([*cells, row[-1]]).rstrip())


def sampling_of(loaded: Loaded, settings: list[str]) -> SamplingConfig | None:
    """How to sample: the model's own way, as ``settings``, each name=value, change it."""
    own = loaded.model.sampling
    if not settings:
        return own
    if own is None:
        raise UserError(f"--set: model {loaded.checkpoint.run.model} has no settings of sampling")
    return type(own).from_settings(pairs(settings), own.to_dict())


class Asked(NamedTuple):
    """The options that say what to generate."""

    labels: str | None = None
    prompts: list[str] | None = None
    prompt_file: Path | None = None
    source: str | None = None

    @property
    def is_any(self) -> bool:
        return any(option is not None for option in self)


def check_guidance(loaded: Loaded, settings: list[str], asked: Asked) -> None:
    """Refuses settings that have no effect on samples without conditions; a model that takes none says so itself."""
    own = loaded.model.sampling
    for name in pairs(settings):
        if own is not None and loaded.model.takes and name in own.of_conditions and not asked.is_any:
            raise UserError(f"--set {name}: has no effect without a condition, such as --labels")


def conditions_of(
    asked: Asked, n: int, loaded: Loaded, of_data: dict[str, str], own: Conditions = NO_CONDITIONS
) -> dict[str, Tensor | Sequence[str]]:
    """The conditions of ``n`` samples that the options ask for, in turns.

    Args:
        own: those of the images that the samples are made of, for what is needed and not asked for.
    """
    model, spec, name = loaded.model, loaded.model.spec, loaded.checkpoint.run.model
    found = {each: own[each] for each, need in model.takes.items() if need == "required" and each in own}
    if asked.source is not None:
        if not model.takes:
            raise UserError(f"--from: model {name} samples without conditions")
        images = load_images(loaded, asked.source, "test", of_data, or_train=True)
        found.update(conditions_for(model, images, n, in_order=True))
        if not found:
            raise UserError(f"--from: data set {images.name} has no {' and no '.join(model.takes)}")
    if asked.labels is not None:
        classes = next((each for each in model.takes if spec[each].kind == "class"), None)
        if classes is None:
            raise UserError(f"--labels: model {name} samples without classes")
        numbers = torch.tensor(_classes_of(asked.labels, list(spec[classes].names)))
        found[classes] = numbers.repeat(-(-n // len(numbers)))[:n]
    if asked.prompts or asked.prompt_file is not None:
        texts = next((each for each in model.takes if spec[each].kind == "text"), None)
        if texts is None:
            raise UserError(f"--prompt: model {name} samples without texts")
        prompts = list(asked.prompts or []) + _prompts(asked.prompt_file)
        found[texts] = tuple(prompts[i % len(prompts)] for i in range(n))
    lacking = [each for each, need in model.takes.items() if need == "required" and each not in found]
    if lacking:
        how = {"class": "--labels", "text": "--prompt", "image": "--from DATA"}
        options = " and ".join(dict.fromkeys(how[spec[each].kind] for each in lacking))
        raise UserError(f"model {name} needs {' and '.join(lacking)} to sample: give {options}")
    return found


def _prompts(path: Path | None) -> list[str]:
    """The lines of a file that are not empty."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts: {path} must be text in UTF-8: {error}") from error
    if not any(lines):
        raise UserError(f"--prompts: {path} holds no line of text")
    return [line for line in lines if line]


def _classes_of(text: str, names: list[str]) -> list[int]:
    """The classes of a list with commas between names or numbers; a name may hold commas itself."""
    parts, classes, first = text.split(","), [], 0
    while first < len(parts):
        # The longest name that is spelled from here on.
        spelled = [(end, ",".join(parts[first:end])) for end in range(len(parts), first, -1)]
        spelled += [(end, name.strip()) for end, name in spelled]
        end, name = next(((end, name) for end, name in spelled if name in names), (first + 1, parts[first].strip()))
        classes.append(_class_of(name, names))
        first = end
    return classes


def _class_of(name: str, names: list[str]) -> int:
    if name in names:
        return names.index(name)
    # Where a class is called by a number, numbers are names.
    numbers = not any(other.isdecimal() for other in names)
    if numbers and name.isdecimal() and len(name) < 10 and int(name) < len(names):
        return int(name)
    close = [] if name.isdecimal() else close_names(name, names)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the classes are {listed(map(repr, names))}"
    what = f"names of classes or numbers from 0 to {len(names) - 1}" if numbers else "names of classes"
    raise UserError(f"--labels takes {what}, got {name!r}; {hint}")


def load_images(
    loaded: Loaded,
    name: str | None,
    split: Split,
    settings: dict[str, str] | None = None,
    *,
    or_train: bool = False,
) -> NamedDataset:
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
    if images.spec.image_shape != loaded.spec.image_shape:
        ours, theirs = ("x".join(map(str, spec.image_shape)) for spec in (loaded.spec, images.spec))
        raise UserError(f"the model makes images of {ours}, data set {images.name} has images of {theirs}")
    return images


def read_images(name: str, split: Split, settings: dict[str, Any]) -> NamedDataset:
    """A data set; what it has to say of its files is shown."""
    try:
        with data.showing_progress():
            images = data.load(name, split, settings)
    except DataError as error:
        kind, _, path = name.partition(":")
        if path and not Path(path).exists() and not data.DATASETS.load(kind).remote:
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


def chosen_images(images: NamedDataset, n: int, seed: int, *, at_most: bool = False) -> Batch:
    """``n`` of the images, chosen by the seed; with ``at_most``, all if there are less."""
    if n > len(images) and not at_most:
        there = counted(len(images), f"{images.split} image")
        raise UserError(f"data set {images.name} has {there}; {n} were requested")
    return first_in_random_order(images, n, Key(seed))


def first_in_random_order(images: NamedDataset, n: int, key: Key) -> Batch:
    """``n`` of the images, or all if there are less, in an order that the key decides."""
    order = ops.uniform((len(images), 1), key)[:, 0].argsort(stable=True)
    return images.batch(order[:n])


def model_names() -> list[str]:
    """The names of all model plugins."""
    return MODELS.names()


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
    return split_settings(pairs(settings))
