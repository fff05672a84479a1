"""``gencore list``: every plugin, and whether it works."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import typer

from gencore.cli.common import print_table
from gencore.config import Config
from gencore.data import DATASETS
from gencore.models import ModelPlugin
from gencore.plugins import MODELS
from gencore.train import TrainConfig
from gencore.train.settings import flat


def _names() -> list[str]:
    return [*MODELS.names(), *DATASETS.names()]


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", autocompletion=_names, help="A model or data set, to list its settings."),
    ] = None,
) -> None:
    """List the models and data sets that are installed, or the settings of one."""
    if name is None:
        _list_plugins()
    elif name in DATASETS.names():
        _list_data_settings(name)
    else:
        _list_settings(name)


def _list_plugins() -> None:
    rows: list[tuple[str, ...]] = [("model", "family", "package", "state", "")]
    for entry in MODELS.entries():
        family, summary = "", ""
        state = MODELS.status(entry)
        if state == "ok":
            plugin = MODELS.load(entry.name)
            family, summary = plugin.family, plugin.summary
            if plugin.preset_of is not None:
                changes = ", ".join(f"{name}={value}" for name, value in _defaults(plugin).items())
                summary = f"{summary} (preset of {plugin.preset_of}: {changes})"
        rows.append((entry.name, family, f"{entry.package} {entry.version}", state, summary))
    print_table(rows)
    print()
    rows = [("data set", "", "package", "state", "")]
    for entry in DATASETS.entries():
        kind, summary = "", ""
        state = DATASETS.status(entry)
        if state == "ok":
            dataset = DATASETS.load(entry.name)
            kind, summary = (":PATH" if dataset.needs_path else ""), dataset.summary
        rows.append((entry.name + kind, "", f"{entry.package} {entry.version}", state, summary))
    print_table(rows)


def _list_settings(name: str) -> None:
    plugin = MODELS.load(name)
    print(f"settings of {name}, for --set:")
    _print_settings(plugin.config, "", flat(plugin.defaults))
    print("\nsettings of the trainer:")
    _print_settings(TrainConfig, "train.", flat(plugin.train))


def _defaults(plugin: ModelPlugin) -> dict[str, Any]:
    """A preset's own defaults, by the names of ``--set``."""
    return flat(plugin.defaults) | {f"train.{name}": value for name, value in flat(plugin.train).items()}


def _list_data_settings(name: str) -> None:
    settings = DATASETS.load(name).settings
    if settings is None:
        print(f"data set {name} has no settings")
        return
    print(f"settings of data set {name}, for --set:")
    _print_settings(settings, "data.")


def _print_settings(config: type[Config], prefix: str, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
    rows: list[tuple[str, ...]] = []
    for setting in config.describe():
        value = defaults.get(setting.name, setting.default)
        default = "none" if value is None else str(value)
        if setting.name in defaults:
            default += " (preset)"
        doc = f"{setting.doc} ({setting.type})" if setting.doc else setting.type
        rows.append((f"  {prefix}{setting.name}", default, doc))
    print_table(rows)
