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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar

from gencore.config import Config, ConfigError, close_names
from gencore.models.base import GenerativeModel, ModelConfig, ModelPlugin
from gencore.spec import DataSpec

Plugin = TypeVar("Plugin")


class PluginError(ValueError):
    """A plugin is unknown, broken, or named like another; the message says which and why."""


@dataclass(frozen=True)
class Entry:
    """One plugin as its package's metadata announces it, before anything of it is imported."""

    name: str
    kind: str
    package: str
    version: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind} plugin {self.name!r} ({self.value}) of package {self.package} {self.version}"


class Registry(Generic[Plugin]):
    """The plugins of one kind.

    Args:
        group: of entry points.
        kind: what a plugin is called in messages.
        fault: what is wrong with the plugin that an entry leads to, one line, or None.
    """

    def __init__(self, group: str, kind: str, fault: Callable[[Entry, Any], str | None]):
        self.group, self.kind, self._fault = group, kind, fault

    def entries(self) -> list[Entry]:
        """The plugins of every installed package, by name; clashing ones each have their entry."""
        return [entry for entry, _ in self._found()]

    def names(self) -> list[str]:
        """The names of all plugins, each once."""
        return list(dict.fromkeys(entry.name for entry in self.entries()))

    def load(self, name: str) -> Plugin:
        """The plugin of this name.

        Raises:
            PluginError: no package has it (close matches are named), two packages have it, or it is broken.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        available = self._found()
        found = [pair for pair in available if pair[0].name == name]
        if not found:
            names = sorted({entry.name for entry, _ in available})
            close = close_names(name, names)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            known = ", ".join(names) if names else "none (is gencore installed, or only on the path?)"
            raise PluginError(f"no {self.kind} plugin is called {name!r}; {hint}available: {known}")
        if len(found) > 1:
            owners = " and ".join(f"{entry.package} {entry.version} ({entry.value})" for entry, _ in found)
            raise PluginError(
                f"two {self.kind} plugins are called {name!r}: in {owners}; uninstall one of the packages"
            )
        return self._imported(*found[0])

    def status(self, entry: Entry) -> str:
        """``"ok"``, ``"clash: ..."`` or ``"broken: ..."`` and the cause, for listings. Imports the plugin, and
        raises nothing."""
        found = self._found()
        others = [other for other, _ in found if other.name == entry.name and other != entry]
        if others:
            return "clash: also in " + ", ".join(f"{other.package} {other.version}" for other in others)
        for other, entry_point in found:
            if other == entry:
                try:
                    self._imported(entry, entry_point)
                except PluginError as error:
                    return f"broken: {reason(error.__cause__ or error)}"
                return "ok"
        return "broken: no longer installed"

    def broken(self, name: str, what: str) -> PluginError:
        """The error for a plugin that is found, imported and then does wrong; raise it from the cause."""
        found = [str(entry) for entry in self.entries() if entry.name == name]
        plugin = found[0] if len(found) == 1 else f"{self.kind} plugin {name!r}"
        return PluginError(f"{plugin} is broken: {what}")

    @contextlib.contextmanager
    def blamed(self, name: str, what: str, *allowed: type[Exception]) -> Iterator[None]:
        """Turns an error in the body into one that names the plugin ``name``, its package, and ``what`` failed.

        What is ``allowed`` stays what it is, as do short memory, an error that names a plugin already, and any error of
        what no plugin made, whose ``name`` is empty.

        Raises:
            PluginError: from the error, which keeps its traceback.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            if not name or isinstance(error, (PluginError, MemoryError, *allowed)):
                raise
            raise self.broken(name, f"{what}: {reason(error)}") from error

    def _found(self) -> list[tuple[Entry, metadata.EntryPoint]]:
        found = []
        for point in metadata.entry_points(group=self.group):
            package, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "")
            found.append((Entry(point.name, self.kind, package, version, point.value), point))
        return sorted(found, key=lambda pair: (pair[0].name, pair[0].package))

    def _imported(self, entry: Entry, entry_point: metadata.EntryPoint) -> Any:
        try:
            plugin = entry_point.load()
        except (Exception, SystemExit) as error:
            raise PluginError(f"{entry} is broken: {reason(error)}") from error
        fault = self._fault(entry, plugin)
        if fault:
            raise PluginError(f"{entry} is broken: {fault}") from TypeError(fault)
        return plugin


def build_model(plugin: ModelPlugin, config: ModelConfig, spec: DataSpec) -> GenerativeModel:
    """The model that the plugin builds for such data, looked at before anything relies on it.

    Raises:
        ConfigError: the configuration does not go with the data, or the plugin refuses it.
        PluginError: building it raises anything else, or gives what is no model that can be trained.
    """
    if faults := faults_with(plugin, config, spec):
        raise ConfigError(plugin.name, faults)
    try:
        model = plugin.build(config, spec)
        fault = _built_fault(plugin, model, spec)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise MODELS.broken(plugin.name, reason(error)) from error
    if fault:
        raise MODELS.broken(plugin.name, fault) from TypeError(fault)
    if missing := [name for name in model.takes if name not in spec]:
        told = f"data: must give what model {plugin.name} takes, but lack"
        raise ConfigError(plugin.name, [f"{told} {name!r}" for name in missing])
    model.plugin_name = plugin.name
    return model


def faults_with(plugin: ModelPlugin, config: ModelConfig, spec: DataSpec) -> list[str]:
    """What does not go with such data in a configuration, as its ``faults_with`` says it.

    Raises:
        PluginError: that raises an error, or gives what are no lines.
    """
    with blamed(plugin.name, "faults_with()"):
        faults = config.faults_with(spec)
        faults = [] if faults is None else list(faults) if not isinstance(faults, str) else [faults]
        if any(not isinstance(fault, str) for fault in faults):
            raise TypeError(f"it must give lines, got {faults!r}")
    return faults


def blamed(name: str, what: str, *allowed: type[Exception]) -> AbstractContextManager[None]:
    """:meth:`Registry.blamed` of models."""
    return MODELS.blamed(name, what, *allowed)


def _model_fault(entry: Entry, plugin: Any) -> str | None:
    if not isinstance(plugin, ModelPlugin):
        return f"it must be a gencore.models.ModelPlugin, but is {kind_of(plugin)}"
    if plugin.name != entry.name:
        return f"its entry point is called {entry.name!r}, but the plugin calls itself {plugin.name!r}"
    if not isinstance(plugin.family, str) or not plugin.family:
        return f"its family must be a word, but is {plugin.family!r}"
    config = plugin.config
    if not (isinstance(config, type) and issubclass(config, ModelConfig)):
        return f"its config must be a subclass of gencore.models.ModelConfig, but is {kind_of(config)}"
    if fault := config_fault("config", config):
        return fault
    if not callable(plugin.build):
        return f"its build must be callable, but is {kind_of(plugin.build)}"
    for name in ("defaults", "train"):
        if not isinstance(getattr(plugin, name), Mapping):
            return f"its {name} must be a mapping, but is {kind_of(getattr(plugin, name))}"
    try:
        plugin.config_of({})
    except ConfigError as error:
        return f"its defaults are wrong: {'; '.join(error.faults)}"
    return None


def config_fault(what: str, config: type[Config]) -> str | None:
    """What keeps a plugin's class of settings, called ``what``, from being one; None if nothing does."""
    if "__dataclass_params__" not in vars(config):
        return f"its {what} {config.__name__} must be decorated with @dataclass(frozen=True)"
    required = [f.name for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]
    if required:
        return f"every setting of its {what} must have a default, but {', '.join(required)} has none"
    return None


def _built_fault(plugin: ModelPlugin, model: Any, spec: DataSpec) -> str | None:
    if not isinstance(model, GenerativeModel):
        return f"build must return a gencore.models.GenerativeModel, but what it returns is {kind_of(model)}"
    config = getattr(model, "config", None)
    if not isinstance(config, plugin.config):
        return f"its model must keep its {plugin.config.__name__} as config, but config is {kind_of(config)}"
    if getattr(model, "spec", None) != spec:
        return "its model must keep the DataSpec that it is built with as spec"
    if type(model).phases is GenerativeModel.phases:
        return f"its model {type(model).__name__} does not implement phases()"
    if not isinstance(model.takes, Mapping):
        return f"takes of its model must be a mapping, but is {kind_of(model.takes)}"
    for name, need in model.takes.items():
        if need not in ("required", "optional"):
            return f"takes[{name!r}] of its model must be 'required' or 'optional', but is {need!r}"
    return None


def kind_of(value: Any) -> str:
    """What a value is, for messages: its type, or for a class its name."""
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"of type {type(value).__qualname__}"


def reason(error: BaseException) -> str:
    """One line: the error's type and message."""
    message = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {message}" if message else kind


MODELS: Registry[ModelPlugin] = Registry("gencore.models", "model", _model_fault)
