"""What a data set is, and how one is named: ``digits``, ``mnist:some/folder``, ``images:some/archive.zip``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gencore import plugins
from gencore.config import Config, ConfigError
from gencore.models.base import Batch
from gencore.progress import Progress
from gencore.text import counted, listed, shown

Split = Literal["train", "test"]

# Images are kept in memory; beyond this many bytes of pixels a loader should refuse rather than swap.
MAX_BYTES = 32 << 30

# Pixels are hashed in pieces of about this many bytes.
_PIECE = 1 << 24

# Reading that takes no longer than this many seconds shows no bar.
_QUICK = 1.0

_showing: ContextVar[bool] = ContextVar("gencore.data.showing_progress", default=False)


class DataError(ValueError):
    """A data set cannot be read: the message names the file (or the option) and what is wrong with it.

    Args:
        message: one line.
        files: the files at fault, if they are many, relative to the data set's path.

    Attributes:
        files: all of them, also where the message names the first ones only; empty if the message says all.
    """

    def __init__(self, message: str, files: Sequence[str] = ()):
        super().__init__(message)
        self.files = tuple(files)


class MissingSplitError(DataError):
    """A data set has no images for the split that was asked for; its other split may be read."""


class ImageDataset:
    """Images of one size, as uint8 in memory, with a class label each or none.

    Args:
        name: what the data set is called, for titles and logs.
        split: ``"train"`` or ``"test"``.
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, len(class_names)), or None.
        class_names: the name of every class, all different; empty without labels.
        notes: what a user should know of how the files were read, a line each, such as what was skipped.

    Raises:
        TypeError: a tensor of another dtype, or a class name that is no string.
        ValueError: shapes, labels or class names that do not fit together, or no image at all.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        images: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        check_split(split)
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        if images.dim() != 4 or images.numel() == 0:
            raise ValueError(f"images must be of shape (N, C, H, W) and not empty, got {tuple(images.shape)}")
        self.class_names = _checked_names(class_names)
        if labels is None:
            if self.class_names:
                raise ValueError(f"class_names must be empty without labels, got {counted(self.num_classes, 'name')}")
        else:
            if labels.dtype != torch.int64:
                raise TypeError(f"labels must be int64, got {labels.dtype}")
            if labels.shape != images.shape[:1]:
                raise ValueError(f"labels must be of shape ({len(images)},), got {tuple(labels.shape)}")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"labels must be in [0, {self.num_classes}), got {low} to {high}")
        self.name = name
        self.split: Split = split
        self.images = images
        self.labels = labels
        self.notes = tuple(notes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the pixels, the labels and the class names, in their order; not of the name or the files.

        Computed when it is first asked for, from the tensors as they are then.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([list(self.images.shape), self.labels is not None, self.class_names]).encode())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        for images in self.images.split(max(1, _PIECE // self.images[0].numel())):
            digest.update(images.cpu().contiguous().numpy())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        """One image (C, H, W), float32 in [0, 1], and its class, or None."""
        label = None if self.labels is None else int(self.labels[index])
        return self.images[index].float() / 255, label

    def batch(self, indices: Tensor) -> Batch:
        """The images at ``indices`` (B,) int64, float32 in [0, 1], with their labels, or None."""
        labels = None if self.labels is None else self.labels[indices]
        return Batch(self.images[indices].float() / 255, labels)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.image_shape)
        classes = counted(self.num_classes, "class", "classes") if self.num_classes else "no classes"
        return f"<{self.name} {self.split}: {counted(len(self), 'image')} {shape}, {classes}>"


@dataclass(frozen=True)
class DatasetPlugin:
    """What an entry point of the group ``gencore.datasets`` names: how a data set is called and read.

    ``load(path, split)`` gets the path of ``name:path``, or None when there was none; with ``needs_path`` there always
    is one. A plugin with ``settings``, a frozen :class:`gencore.config.Config` whose every field has a default, is
    called as ``load(path, split, settings)``, with an instance of it.

    ``load`` must return the same images in the same order every time. It raises :class:`MissingSplitError` where there
    are no images for the split, and :class:`DataError` for whatever else is wrong with the files.
    """

    name: str
    load: Callable[..., ImageDataset]
    needs_path: bool = False
    summary: str = ""
    settings: type[Config] | None = None


def load(spec: str, split: Split, settings: Mapping[str, Any] | None = None) -> ImageDataset:
    """The data set that ``spec`` names, ``name`` or ``name:path``, read with the plugin's ``settings``.

    Raises:
        PluginError: no such data set, or its plugin is broken.
        ConfigError: settings that the data set does not have, or wrong values; every fault begins with ``data.``.
        MissingSplitError: there are no images for this split.
        DataError: the files are missing or wrong, or the data set needs a path and got none.
    """
    check_split(split)
    plugin, path = _named(spec)
    arguments: list[Any] = [_path(path) if path else None, split]
    if plugin.needs_path and not path:
        raise DataError(f"data set {plugin.name} needs a path: {plugin.name}:PATH")
    config = _configured(plugin, {} if settings is None else settings)
    try:
        dataset = plugin.load(*arguments) if config is None else plugin.load(*arguments, config)
    except (DataError, ConfigError, MemoryError):
        raise
    except OSError as error:
        where = error.filename or path or plugin.name
        raise DataError(f"data set {plugin.name}: cannot read {where}: {error.strerror or error}") from error
    except (Exception, SystemExit) as error:
        raise plugins.broken("dataset", plugin.name, plugins.reason(error)) from error
    if not isinstance(dataset, ImageDataset):
        what = f"load must return an ImageDataset, got {type(dataset).__name__}"
        raise plugins.broken("dataset", plugin.name, what)
    return dataset


def check(train: ImageDataset, spec: str, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Reads the other splits of the data set that ``train`` was loaded from, so that their faults are known before a
    training begins; returns their notes.

    A split without images is a note: it is a fault for what needs that split only.

    Args:
        train: the split to train on.
        spec, settings: as :func:`load` took them.

    Raises:
        PluginError, ConfigError: as :func:`load`.
        DataError: as :func:`load`; or a split has another image shape or other class names than ``train``, or one of
            them has labels and the other has none.
    """
    if not isinstance(train, ImageDataset):
        raise TypeError(f"train must be an ImageDataset, got {type(train).__name__}")
    notes: list[str] = []
    for split in typing.get_args(Split):
        if split != train.split:
            try:
                notes += _agreeing(train, spec, split, settings)
            except MissingSplitError as error:
                notes.append(str(error))
    return tuple(notes)


def _agreeing(train: ImageDataset, spec: str, split: Split, settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The notes of another split, whose pixels are freed on return."""
    other = load(spec, split, settings)
    faults = []
    if other.image_shape != train.image_shape:
        ours, theirs = ("x".join(map(str, images.image_shape)) for images in (train, other))
        faults.append(f"images are {ours} in {train.split}, {theirs} in {split}")
    if (other.labels is None) != (train.labels is None):
        faults.append(f"only {train.split if other.labels is None else split} has labels")
    else:
        faults += _other_names(train, other)
    if faults:
        name = spec.partition(":")[0]
        raise DataError(f"data set {name}: the splits {train.split} and {split} differ: {'; '.join(faults)}")
    return other.notes


def _other_names(train: ImageDataset, other: ImageDataset) -> list[str]:
    """How the class names of two splits differ."""
    faults = []
    for one, another in ((train, other), (other, train)):
        there = set(another.class_names)
        if alone := [name for name in one.class_names if name not in there]:
            faults.append(f"only {one.split} has {'class' if len(alone) == 1 else 'the classes'} {listed(alone)}")
    for i, (ours, theirs) in enumerate(zip(train.class_names, other.class_names, strict=False)):
        if ours != theirs and not faults:
            faults.append(f"class {i} is {shown(ours)} in {train.split}, {shown(theirs)} in {other.split}")
    return faults


@contextlib.contextmanager
def showing_progress() -> Iterator[None]:
    """Within it, reading that takes long is shown on stderr: by a bar on a terminal, else by a line every so often."""
    token = _showing.set(True)
    try:
        yield
    finally:
        _showing.reset(token)


def progress(total: int, *, name: str, unit: str) -> Progress:
    """What a data set's ``load`` tells how far it is; shown within :func:`showing_progress` only."""
    return Progress(total, name=name, unit=unit, shown=_showing.get(), delay=_QUICK)


def settings_type(spec: str) -> type[Config] | None:
    """The settings of the data set that ``spec`` names, or None if it has none; no file is read.

    Raises:
        PluginError: no such data set, or its plugin is broken.
        DataError: the path of ``name:path`` is empty.
    """
    return _named(spec)[0].settings


def check_split(split: str) -> None:
    """Raises ValueError unless ``split`` is ``"train"`` or ``"test"``."""
    if split not in typing.get_args(Split):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")


def absolute_spec(spec: str) -> str:
    """``name:path`` with an absolute path without links, which names the same data set from any folder.

    Nothing is read, and neither the data set nor the path needs to exist. Without a path it is ``spec`` itself.

    Raises:
        DataError: no such path can be.
    """
    name, path = _parted(spec)
    if not path:
        return spec
    place = _path(path)
    try:
        return f"{name}:{os.path.realpath(place)}"
    except (OSError, ValueError, RuntimeError) as error:
        # The folder we are in may be gone; and links may lead on and on.
        raise DataError(f"data set {name}: cannot find the path {path!r}: {error}") from error


def _named(spec: str) -> tuple[DatasetPlugin, str]:
    name, path = _parted(spec)
    return plugins.load_dataset(name), path


def _parted(spec: str) -> tuple[str, str]:
    """The name and the path, which is empty if there is none."""
    if not isinstance(spec, str):
        raise TypeError(f"spec must be a string, name or name:path, got {type(spec).__name__}")
    name, colon, path = spec.partition(":")
    if colon and not path:
        raise DataError(f"the path after {name}: must not be empty")
    return name, path


def _path(text: str) -> Path:
    if "\0" in text:
        raise DataError(f"a path cannot hold a zero byte, got {text!r}")
    try:
        os.fsencode(text)
    except UnicodeError as error:
        raise DataError(f"a path cannot hold the characters of {text!r}: {error}") from error
    # Not the method of Path, which forgets the "./" of a folder that is called like a user.
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise DataError(
            f"the path {text!r} begins with the home directory of a user who is not known; write {'./' + text!r} for a "
            "folder of that name"
        )
    return Path(expanded)


def _checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a sequence of names, got the string {class_names!r}")
    names = tuple(class_names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"class_names must be strings, got {name!r} of type {type(name).__name__}")
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"class_names must be distinct, got {name!r} {count} times")
    return tuple(map(str, names))


def _configured(plugin: DatasetPlugin, settings: Mapping[str, Any]) -> Config | None:
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping of names to values, got {type(settings).__name__}")
    title = f"data set {plugin.name}"
    if plugin.settings is None:
        if settings:
            raise ConfigError(title, [f"data.{name}: is not a setting; {title} has none" for name in settings])
        return None
    try:
        return plugin.settings.from_dict(settings)
    except ConfigError as error:
        raise ConfigError(title, [f"data.{fault}" for fault in error.faults]) from error
    except (Exception, SystemExit) as error:
        raise plugins.broken("dataset", plugin.name, plugins.reason(error)) from error
