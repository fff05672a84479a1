"""``gencore list``: every plugin, and whether it works."""

from __future__ import annotations

from typing import Annotated

import typer

from gencore import plugins
from gencore.config import Config
from gencore.train import TrainConfig


def _names() -> list[str]:
    return [entry.name for entry in (*plugins.list_models(), *plugins.list_datasets())]


def command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", autocompletion=_names, help="A model or data set, to list its settings."),
    ] = None,
) -> None:
    """List the models and data sets that are installed, or the settings of one."""
    if name is None:
        _list_plugins()
    elif name in {entry.name for entry in plugins.list_datasets()}:
        _list_data_settings(name)
    else:
        _list_settings(name)


def _list_plugins() -> None:
    rows: list[tuple[str, ...]] = [("model", "family", "package", "state", "")]
    for entry in plugins.list_models():
        family, summary = "", ""
        state = plugins.status(entry)
        if state == "ok":
            plugin = plugins.load_model(entry.name)
            family, summary = plugin.family, plugin.summary
        rows.append((entry.name, family, f"{entry.package} {entry.version}", state, summary))
    _print_table(rows)
    print()
    rows = [("data set", "", "package", "state", "")]
    for entry in plugins.list_datasets():
        kind, summary = "", ""
        state = plugins.status(entry)
        if state == "ok":
            dataset = plugins.load_dataset(entry.name)
            kind, summary = (":PATH" if dataset.needs_path else ""), dataset.summary
        rows.append((entry.name + kind, "", f"{entry.package} {entry.version}", state, summary))
    _print_table(rows)


def _list_settings(name: str) -> None:
    plugin = plugins.load_model(name)
    print(f"settings of {name}, for --set:")
    _print_settings(plugin.config, "", hidden=("image_shape", "num_classes"))
    print("\nsettings of the trainer:")
    _print_settings(TrainConfig, "train.", hidden=())


def _list_data_settings(name: str) -> None:
    settings = plugins.load_dataset(name).settings
    if settings is None:
        print(f"data set {name} has no settings")
        return
    print(f"settings of data set {name}, for --set:")
    _print_settings(settings, "data.", hidden=())


def _print_settings(config: type[Config], prefix: str, hidden: tuple[str, ...]) -> None:
    rows: list[tuple[str, ...]] = []
    for setting in config.describe():
        if setting.name not in hidden:
            default = "none" if setting.default is None else str(setting.default)
            rows.append(
                (
                    f"  {prefix}{setting.name}",
                    default,
                    f"{setting.doc} ({setting.type})" if setting.doc else setting.type,
                )
            )
    _print_table(rows)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False) if width]
        print("  ".join([*cells, row[-1]]).rstrip())
