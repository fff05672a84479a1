"""The registry: model and data set plugins, found through the entry points of installed packages.

A package offers plugins in its ``pyproject.toml``; the built-in ones come through the same door::

    [project.entry-points."gencore.models"]
    ppca = "my_package.ppca:plugin"          # a gencore.models.ModelPlugin named "ppca"

    [project.entry-points."gencore.datasets"]
    rings = "my_package.rings:plugin"        # a gencore.data.DatasetPlugin named "rings"

Listing reads package metadata and imports no plugin. A plugin that cannot be loaded raises a :class:`PluginError` that
names it, its package and the cause, when it is asked for; it never stands in the way of another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from gencore.config import Config, ConfigError, close_names

if TYPE_CHECKING:
    from gencore.data.base import DatasetPlugin
    from gencore.models.base import GenerativeModel, ModelConfig, ModelPlugin

Kind = Literal["model", "dataset"]

_GROUPS: dict[Kind, str] = {"model": "gencore.models", "dataset": "gencore.datasets"}
_WORDS: dict[Kind, str] = {"model": "model", "dataset": "data set"}


class PluginError(ValueError):
    """A plugin is unknown, broken, or named like another; the message says which and why."""


@dataclass(frozen=True)
class Entry:
    """One plugin as its package's metadata announces it, before anything of it is imported."""

    name: str
    kind: Kind
    package: str
    version: str
    value: str

    def __str__(self) -> str:
        return f"{_WORDS[self.kind]} plugin {self.name!r} ({self.value}) of package {self.package} {self.version}"


def list_models() -> list[Entry]:
    """The model plugins of every installed package, by name; clashing ones each have their entry."""
    return [entry for entry, _ in _entry_points("model")]


def list_datasets() -> list[Entry]:
    """The data set plugins of every installed package, by name; clashing ones each have their entry."""
    return [entry for entry, _ in _entry_points("dataset")]


def load_model(name: str) -> ModelPlugin:
    """The model plugin of this name.

    Raises:
        PluginError: no package has it (close matches are named), two packages have it, or it is broken.
    """
    return typing.cast("ModelPlugin", _load("model", name))


def load_dataset(name: str) -> DatasetPlugin:
    """The data set plugin of this name.

    Raises:
        PluginError: no package has it (close matches are named), two packages have it, or it is broken.
    """
    return typing.cast("DatasetPlugin", _load("dataset", name))


def build_model(plugin: ModelPlugin, config: ModelConfig) -> GenerativeModel:
    """The model that the plugin builds, looked at before anything relies on it: its ``config`` and its phases.

    Raises:
        ConfigError: the plugin's own, for a configuration that it refuses.
        PluginError: building it raises anything else, or gives what is no model that can be trained.
    """
    try:
        model = plugin.build(config)
        fault = _built_fault(plugin, model)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise broken("model", plugin.name, reason(error)) from error
    if fault:
        raise broken("model", plugin.name, fault) from TypeError(fault)
    model.plugin_name = plugin.name
    return model


def broken(kind: Kind, name: str, what: str) -> PluginError:
    """The error for a plugin that is found, imported and then does wrong; raise it from the cause."""
    found = [str(entry) for entry, _ in _entry_points(kind) if entry.name == name]
    plugin = found[0] if len(found) == 1 else f"{_WORDS[kind]} plugin {name!r}"
    return PluginError(f"{plugin} is broken: {what}")


@contextlib.contextmanager
def blamed(name: str, what: str, *allowed: type[Exception]) -> Iterator[None]:
    """Turns an error in the body into one that names the model plugin ``name``, its package, and ``what`` failed.

    What is ``allowed`` stays what it is, as do short memory, an error that names a plugin already, and any error of a
    model that no plugin built, whose ``name`` is empty.

    Raises:
        PluginError: from the error, which keeps its traceback.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if not name or isinstance(error, (PluginError, MemoryError, *allowed)):
            raise
        raise broken("model", name, f"{what}: {reason(error)}") from error


def status(entry: Entry) -> str:
    """``"ok"``, ``"clash: ..."`` or ``"broken: ..."`` and the cause, for listings. Imports the plugin; never raises."""
    others = [other for other, _ in _entry_points(entry.kind) if other.name == entry.name and other != entry]
    if others:
        return "clash: also in " + ", ".join(f"{other.package} {other.version}" for other in others)
    for other, entry_point in _entry_points(entry.kind):
        if other == entry:
            try:
                _import(entry, entry_point)
            except PluginError as error:
                return f"broken: {reason(error.__cause__ or error)}"
            return "ok"
    return "broken: no longer installed"


def _entry_points(kind: Kind) -> list[tuple[Entry, metadata.EntryPoint]]:
    found = []
    for point in metadata.entry_points(group=_GROUPS[kind]):
        package, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
        found.append((Entry(point.name, kind, package, version, point.value), point))
    return sorted(found, key=lambda pair: (pair[0].name, pair[0].package))


def _load(kind: Kind, name: str) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    available = _entry_points(kind)
    found = [pair for pair in available if pair[0].name == name]
    if not found:
        names = sorted({entry.name for entry, _ in available})
        close = close_names(name, names)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        known = ", ".join(names) if names else "none (is gencore installed, or only on the path?)"
        raise PluginError(f"no {_WORDS[kind]} plugin is called {name!r}; {hint}available: {known}")
    if len(found) > 1:
        owners = " and ".join(f"{entry.package} {entry.version} ({entry.value})" for entry, _ in found)
        raise PluginError(f"two {_WORDS[kind]} plugins are called {name!r}: in {owners}; uninstall one of the packages")
    return _import(*found[0])


def _import(entry: Entry, entry_point: metadata.EntryPoint) -> Any:
    try:
        plugin = entry_point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{entry} is broken: {reason(error)}") from error
    fault = _model_fault(entry, plugin) if entry.kind == "model" else _dataset_fault(entry, plugin)
    if fault:
        raise PluginError(f"{entry} is broken: {fault}") from TypeError(fault)
    return plugin


def _model_fault(entry: Entry, plugin: Any) -> str | None:
    from gencore.models.base import Family, ModelConfig, ModelPlugin

    if not isinstance(plugin, ModelPlugin):
        return f"it must be a gencore.models.ModelPlugin, but is {_kind_of(plugin)}"
    if plugin.name != entry.name:
        return f"its entry point is called {entry.name!r}, but the plugin calls itself {plugin.name!r}"
    if plugin.family not in typing.get_args(Family):
        return f"its family must be one of {', '.join(typing.get_args(Family))}, but is {plugin.family!r}"
    config = plugin.config
    if not (isinstance(config, type) and issubclass(config, ModelConfig)):
        return f"its config must be a subclass of gencore.models.ModelConfig, but is {_kind_of(config)}"
    if fault := _config_fault("config", config):
        return fault
    if not callable(plugin.build):
        return f"its build must be callable, but is {_kind_of(plugin.build)}"
    return None


def _dataset_fault(entry: Entry, plugin: Any) -> str | None:
    from gencore.data.base import DatasetPlugin

    if not isinstance(plugin, DatasetPlugin):
        return f"it must be a gencore.data.DatasetPlugin, but is {_kind_of(plugin)}"
    if plugin.name != entry.name:
        return f"its entry point is called {entry.name!r}, but the plugin calls itself {plugin.name!r}"
    if not callable(plugin.load):
        return f"its load must be callable, but is {_kind_of(plugin.load)}"
    settings = plugin.settings
    if settings is None:
        return None
    if not (isinstance(settings, type) and issubclass(settings, Config)):
        return f"its settings must be None or a subclass of gencore.config.Config, but are {_kind_of(settings)}"
    return _config_fault("settings", settings)


def _config_fault(what: str, config: type[Config]) -> str | None:
    if "__dataclass_params__" not in vars(config):
        return f"its {what} {config.__name__} must be decorated with @dataclass(frozen=True)"
    required = [f.name for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]
    if required:
        return f"every setting of its {what} must have a default, but {', '.join(required)} has none"
    return None


def _built_fault(plugin: ModelPlugin, model: Any) -> str | None:
    from gencore.models.base import GenerativeModel, Phase

    if not isinstance(model, GenerativeModel):
        return f"build must return a gencore.models.GenerativeModel, but what it returns is {_kind_of(model)}"
    config = getattr(model, "config", None)
    if not isinstance(config, plugin.config):
        return f"its model must keep its {plugin.config.__name__} as config, but config is {_kind_of(config)}"
    try:
        phases = model.phases()
    except NotImplementedError:
        return f"its model {type(model).__name__} does not implement phases()"
    if not (isinstance(phases, Sequence) and all(isinstance(phase, Phase) for phase in phases)):
        return "phases() of its model must return a sequence of gencore.models.Phase"
    if not phases:
        return "its model lists no training phases"
    return None


def _kind_of(value: Any) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"of type {type(value).__qualname__}"


def reason(error: BaseException) -> str:
    """One line: the error's type and message."""
    message = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {message}" if message else kind
