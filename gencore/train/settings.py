"""Settings by name, of the model, the trainer and the data set, from a command line, a file or a mapping."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gencore import data
from gencore.config import Config, ConfigError
from gencore.train.checkpoint import Run

# What is learned where nothing is named.
DEFAULT_DATA = "digits"

_GROUPS = ("train", "data")


class Settings(NamedTuple):
    """Settings apart, those of the trainer (``train.``) and of the data set (``data.``) without prefix."""

    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]


def apart(settings: Mapping[str, Any]) -> Settings:
    """The settings by what they set; ``train.steps`` may be ``{"train": {"steps": ...}}`` too."""
    found = Settings({}, {}, {})
    for name, value in settings.items():
        group, dot, key = name.partition(".")
        if dot and group in _GROUPS:
            getattr(found, group)[key] = value
        elif name in _GROUPS and isinstance(value, Mapping):
            getattr(found, name).update(flat(value))
        elif isinstance(value, Mapping):
            found.model.update(flat({name: value}))
        else:
            found.model[name] = value
    return found


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update({f"{name}.{key}": each for key, each in flat(value).items()})
        else:
            found[name] = value
    return found


def over(base: Settings, settings: Settings) -> Settings:
    """Those of ``base`` with ``settings`` in place of those that have the same names."""
    return Settings(*({**below, **above} for below, above in zip(base, settings, strict=True)))


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a JSON or TOML file, with the names that ``apart`` takes.

    Raises:
        ConfigError: it is neither, or no table of settings; the message names it.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        if path.suffix.lower() == ".toml":
            try:
                import tomllib  # type: ignore[import-not-found, unused-ignore]
            except ModuleNotFoundError:
                fault = f"{path}: TOML can be read by Python 3.11 and later; write it as JSON"
                raise ConfigError("settings", [fault]) from None
            values = tomllib.loads(content.decode("utf-8"))
        else:
            values = json.loads(content)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix.lower() == ".toml" else "JSON"
        raise ConfigError("settings", [f"{path}: is no {kind} ({error})"]) from error
    if not isinstance(values, dict):
        raise ConfigError("settings", [f"{path}: must hold settings by name, but holds {type(values).__name__}"])
    return values


def collect(
    config: type[Config],
    settings: Mapping[str, Any],
    base: Any,
    prefix: str,
    faults: list[str],
    known: Iterable[str] | None = None,
) -> Any:
    """The configuration; its faults go to ``faults``, so that those of model, trainer and data are told together.

    Args:
        prefix: what the settings' names begin with where they are given.
        known: all names that one may have been meant as.
    """
    known = [prefix + name for name in config.setting_names()] if known is None else known
    try:
        return config.from_settings(settings, base, prefix=prefix, known=known)
    except ConfigError as error:
        faults += error.faults
        return None


def data_settings(
    saved: Run | None, name: str | None, settings: Mapping[str, Any], others: Iterable[str] = ()
) -> dict[str, Any]:
    """The settings of the data set ``name`` (default: that of the run), as ``data.NAME`` change them.

    They begin with those of the run, if the data set is of the same kind.

    Args:
        others: faults found before, to be told with those found here, if there are any.

    Raises:
        ConfigError: with every fault.
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
