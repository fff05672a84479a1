"""What a data set is, and how one is named: ``digits``, ``mnist:some/folder``, ``images:some/archive.zip``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gencore import plugins
from gencore.config import Config, ConfigError
from gencore.noise import Key
from gencore.progress import Progress
from gencore.spec import Batch, Condition, Dataset, DataSpec
from gencore.text import counted, listed, shown

Split = Literal["train", "test"]

# Images that are kept in memory: beyond this many bytes of pixels a loader should refuse rather than swap.
MAX_BYTES = 32 << 30

# Images of a batch where all of a data set are looked at.
_AT_A_TIME = 256

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


class NamedDataset(Dataset):
    """What :func:`load` gives: a :class:`gencore.spec.Dataset` that knows where it comes from.

    A subclass adds :meth:`__len__` and :meth:`batch`, and the fingerprint and :meth:`values` if it knows quicker ways.

    Attributes:
        name: what the data set is called, for titles and logs.
        split: ``"train"`` or ``"test"``.
        spec: what it gives.
        notes: what a user should know of how the files were read, a line each, such as what was skipped.
        workers: whether reading takes so long that a training does it in processes of its own.
    """

    workers = False

    def __init__(self, name: str, split: Split, spec: DataSpec, notes: Sequence[str] = ()):
        check_split(split)
        self.name = name
        self.split: Split = split
        self._spec = spec
        self._notes = tuple(notes)

    @property
    def spec(self) -> DataSpec:
        return self._spec

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, ``spec.class_names``; empty without classes."""
        return self.spec.class_names

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Tensor, key: Key | None = None) -> Batch:
        raise NotImplementedError

    def values(self, name: str) -> Tensor | Sequence[str]:
        """A condition of all images, as one batch of all would have it without a key.

        Raises:
            KeyError: no condition is called so.
        """
        self.spec[name]
        found = [self.batch(indices).conditions[name] for indices in torch.arange(len(self)).split(_AT_A_TIME)]
        if all(isinstance(values, Tensor) for values in found):
            return torch.cat([values for values in found if isinstance(values, Tensor)])
        return [value for values in found for value in values]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the content: images, conditions and their names, in their order; not of the name or the files."""
        return fingerprint_of(self)

    def __repr__(self) -> str:
        return f"<{self.name} {self.split}: {counted(len(self), 'image')} {described(self.spec)}>"


class _Adapted(NamedDataset):
    """A data set of a plugin that has the three members of the protocol, and of the others of a NamedDataset ``notes``,
    ``workers`` and ``fingerprint`` at most."""

    def __init__(self, dataset: Dataset, name: str, split: Split):
        super().__init__(name, split, dataset.spec, getattr(dataset, "notes", ()))
        self._dataset = dataset
        self.workers = bool(getattr(dataset, "workers", False))

    @functools.cached_property
    def fingerprint(self) -> str:
        own = getattr(self._dataset, "fingerprint", None)
        return own if isinstance(own, str) else fingerprint_of(self._dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Tensor, key: Key | None = None) -> Batch:
        return self._dataset.batch(indices, key)


def described(spec: DataSpec) -> str:
    """The spec in words: ``3x64x64, 10 classes, text``."""
    told = ["x".join(map(str, spec.image_shape))]
    told += [_in_words(condition) for condition in spec.conditions]
    return ", ".join(told)


def _in_words(condition: Condition) -> str:
    if condition.kind == "class":
        return counted(len(condition.names), "class", "classes")
    if condition.shape is not None:
        return f"{condition.name} {'x'.join(map(str, condition.shape))}" + ("" if condition.paired else ", unpaired")
    return condition.name


def fingerprint_of(dataset: Dataset) -> str:
    """A hash of all that a data set gives without a key."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(dataset.spec).encode())
    for indices in torch.arange(len(dataset)).split(_AT_A_TIME):
        batch = dataset.batch(indices)
        digest.update(batch.images.cpu().contiguous().numpy().data)
        for name in sorted(batch.conditions):
            values = batch.conditions[name]
            if isinstance(values, Tensor):
                digest.update(values.cpu().contiguous().numpy().data)
            else:
                digest.update(repr(tuple(values)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class DatasetPlugin:
    """What an entry point of the group ``gencore.datasets`` names: how a data set is called and read.

    ``load(path, split)`` gets the path of ``name:path``, or None when there was none; with ``needs_path`` there always
    is one. A plugin with ``settings``, a frozen :class:`gencore.config.Config` whose every field has a default, is
    called as ``load(path, split, settings)``, with an instance of it. With ``remote``, what follows the colon may also
    be the name of something on a server, where no such path is there.

    ``load`` gives a :class:`gencore.data.ImageDataset`, or anything else that is a :class:`gencore.spec.Dataset`, with
    the same images in the same order every time. It raises :class:`MissingSplitError` where there
    are no images for the split, and :class:`DataError` for whatever else is wrong with the files.
    """

    name: str
    load: Callable[..., Dataset]
    needs_path: bool = False
    summary: str = ""
    settings: type[Config] | None = None
    remote: bool = False


def load(spec: str, split: Split, settings: Mapping[str, Any] | None = None) -> NamedDataset:
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
        raise DATASETS.broken(plugin.name, plugins.reason(error)) from error
    if isinstance(dataset, NamedDataset):
        return dataset
    if not isinstance(dataset, Dataset) or not isinstance(dataset.spec, DataSpec):
        what = f"load must return a data set with spec, len() and batch(), got {type(dataset).__name__}"
        raise DATASETS.broken(plugin.name, what)
    return _Adapted(dataset, plugin.name, split)


def check(train: NamedDataset, spec: str, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
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
    if not isinstance(train, NamedDataset):
        raise TypeError(f"train must be a data set that load gave, got {type(train).__name__}")
    notes: list[str] = []
    for split in typing.get_args(Split):
        if split != train.split:
            try:
                notes += _agreeing(train, spec, split, settings)
            except MissingSplitError as error:
                notes.append(str(error))
    return tuple(notes)


def _agreeing(train: NamedDataset, spec: str, split: Split, settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The notes of another split, whose pixels are freed on return."""
    other = load(spec, split, settings)
    check_same(train, other, spec)
    return other.notes


def check_same(train: NamedDataset, other: NamedDataset, spec: str) -> None:
    """Raises :class:`DataError` if two splits of the data set ``spec`` give different things, as :func:`check` does."""
    faults = []
    split = other.split
    if other.spec.image_shape != train.spec.image_shape:
        ours, theirs = ("x".join(map(str, images.spec.image_shape)) for images in (train, other))
        faults.append(f"images are {ours} in {train.split}, {theirs} in {split}")
    for one, another in ((train, other), (other, train)):
        alone = [condition.name for condition in one.spec.conditions if condition.name not in another.spec]
        if alone:
            faults.append(f"only {one.split} has {_plural(alone)}")
    for condition in train.spec.conditions:
        if condition.name in other.spec and (theirs_too := other.spec[condition.name]) != condition:
            faults += _differences(train, condition, other, theirs_too)
    if faults:
        name = spec.partition(":")[0]
        raise DataError(f"data set {name}: the splits {train.split} and {split} differ: {'; '.join(faults)}")


def _plural(names: Sequence[str]) -> str:
    """``labels``, ``texts``, ``sources``: what images of a split have."""
    return " and ".join(f"{name}s" for name in names)


def _differences(train: NamedDataset, ours: Condition, other: NamedDataset, theirs: Condition) -> list[str]:
    """How a condition of two splits differs."""
    if "class" not in (ours.kind, theirs.kind) or ours.kind != theirs.kind:
        return [
            f"{ours.name} is {ours.kind} {ours.shape} in {train.split}, {theirs.kind} {theirs.shape} in {other.split}"
        ]
    faults = []
    for split, names, others in ((train.split, ours.names, theirs.names), (other.split, theirs.names, ours.names)):
        there = set(others)
        if alone := [name for name in names if name not in there]:
            faults.append(f"only {split} has {'class' if len(alone) == 1 else 'the classes'} {listed(alone)}")
    for i, (mine, its) in enumerate(zip(ours.names, theirs.names, strict=False)):
        if mine != its and not faults:
            faults.append(f"class {i} is {shown(mine)} in {train.split}, {shown(its)} in {other.split}")
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

    No data are read, and neither the data set nor the path needs to exist. Without a path it is ``spec`` itself, and
    so it is if the path is a name on a server.

    Raises:
        DataError: no such path can be.
    """
    name, path = _parted(spec)
    if not path:
        return spec
    place = _path(path)
    try:
        if not os.path.lexists(place) and _is_remote(name):
            return spec
        return f"{name}:{os.path.realpath(place)}"
    except (OSError, ValueError, RuntimeError) as error:
        # The folder we are in may be gone; and links may lead on and on.
        raise DataError(f"data set {name}: cannot find the path {path!r}: {error}") from error


def _is_remote(name: str) -> bool:
    try:
        return DATASETS.load(name).remote
    except plugins.PluginError:
        return False


def _named(spec: str) -> tuple[DatasetPlugin, str]:
    name, path = _parted(spec)
    return DATASETS.load(name), path


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
        raise DATASETS.broken(plugin.name, plugins.reason(error)) from error


def _plugin_fault(entry: plugins.Entry, plugin: Any) -> str | None:
    if not isinstance(plugin, DatasetPlugin):
        return f"it must be a gencore.data.DatasetPlugin, but is {plugins.kind_of(plugin)}"
    if plugin.name != entry.name:
        return f"its entry point is called {entry.name!r}, but the plugin calls itself {plugin.name!r}"
    if not callable(plugin.load):
        return f"its load must be callable, but is {plugins.kind_of(plugin.load)}"
    settings = plugin.settings
    if settings is None:
        return None
    if not (isinstance(settings, type) and issubclass(settings, Config)):
        return f"its settings must be None or a subclass of gencore.config.Config, but are {plugins.kind_of(settings)}"
    return plugins.config_fault("settings", settings)


DATASETS: plugins.Registry[DatasetPlugin] = plugins.Registry("gencore.datasets", "data set", _plugin_fault)
