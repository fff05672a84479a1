"""Configurations: frozen dataclasses whose every field is checked, with all faults reported at once.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Optimizer(Config):
...     lr: float = field(1e-3, gt=0, doc="step size")
...     betas: tuple[float, float] = field((0.9, 0.999), ge=0, lt=1)
>>> Optimizer.from_settings({"lr": "0.01"})
Optimizer(lr=0.01, betas=(0.9, 0.999))
>>> Optimizer.from_dict({"lr": 0, "beta": 1})
Traceback (most recent call last):
gencore.config.ConfigError: Optimizer has 2 faults:
  beta: is not a setting; did you mean betas?
  lr: must be > 0, was 0.0
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, Union

from gencore.arguments import as_int

ConfigType = TypeVar("ConfigType", bound="Config")


class ConfigError(ValueError):
    """A configuration is wrong. ``faults`` holds one line per fault: the field, what it must be, what it was."""

    def __init__(self, name: str, faults: Iterable[str]):
        self.name = name
        self.faults: list[str] = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{name} has {count}:\n" + "\n".join(f"  {fault}" for fault in self.faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigError, (self.name, self.faults)


class Setting(NamedTuple):
    """One field as :meth:`Config.describe` lists it; nested fields have dotted names."""

    name: str
    type: str
    default: Any
    doc: str


def field(
    default: Any = dataclasses.MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    doc: str = "",
) -> Any:
    """A field of a :class:`Config`, with bounds on its number, or on each number of its tuple."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return dataclasses.field(default=default, metadata={"bounds": bounds, "doc": doc})


@dataclass(frozen=True)
class Config:
    """Base class of configurations; subclasses are ``@dataclass(frozen=True)`` too.

    Types are checked from the annotations: int, float, bool, str, ``Literal``, tuples (fixed or variadic), unions with
    None, and nested configurations. An int is taken where a float is asked for (and becomes one), a list where a tuple
    is; NumPy's numbers become Python's; a bool is no int; NaN and infinities are refused.

    Raises:
        ConfigError: with every fault of every field. What :meth:`check` finds is reported once the fields are right.
    """

    def __post_init__(self) -> None:
        faults: list[str] = []
        annotations = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = _checked(f.name, annotations[f.name], getattr(self, f.name), _bounds(f), faults)
            object.__setattr__(self, f.name, value)
        faults = faults or list(self.check())
        if faults:
            raise ConfigError(type(self).__name__, faults)

    def check(self) -> Iterable[str]:
        """Faults between fields, one line each; called when every field by itself is right."""
        return ()

    @classmethod
    def from_dict(cls: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
        """The inverse of :meth:`to_dict`; fields that are not named keep their defaults.

        Raises:
            ConfigError: with every fault, unknown keys (with the names they resemble) among them.
        """
        faults: list[str] = []
        config = _from_mapping(cls, values, "", faults)
        if faults:
            raise ConfigError(cls.__name__, faults)
        return config

    @classmethod
    def from_settings(
        cls: type[ConfigType],
        settings: Mapping[str, Any],
        base: Mapping[str, Any] | None = None,
        *,
        prefix: str = "",
        known: Iterable[str] | None = None,
    ) -> ConfigType:
        """A configuration from settings by name, on top of ``base`` (as in :meth:`to_dict`).

        Dots name nested fields: ``optimizer.lr``; so does a mapping. A string, as of a command line, is read by the
        field's type: ``3``, ``1e-3``, ``true``, ``none``, ``256,256``. Any other value is taken as it is.

        Args:
            prefix: what every name begins with in the faults, such as ``train.``.
            known: the names, with their prefix, that an unknown one may have been meant as; by default those of this
                configuration.

        Raises:
            ConfigError: with every fault, of the settings and of ``base``.
        """
        values = merged(base or {}, {})
        faults: list[str] = []
        known = [prefix + name for name in cls.setting_names()] if known is None else list(known)
        for name, value in settings.items():
            _set(cls, values, name, value, prefix, known, faults)
        unread = {fault.split(":", 1)[0] for fault in faults}
        try:
            config = cls.from_dict(values)
        except ConfigError as error:
            faults += [fault for fault in error.faults if fault.split(":", 1)[0] not in unread]
        if faults:
            raise ConfigError(cls.__name__, [prefix + fault for fault in faults])
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers, strings and None, as JSON can hold them; ``from_dict`` gives an equal object."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def setting_names(cls) -> list[str]:
        """The dotted name of every setting."""
        return [setting.name for setting in cls.describe()]

    @classmethod
    def describe(cls) -> list[Setting]:
        """Every setting with its type, default and meaning, for help texts."""
        settings = []
        annotations = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            annotation = annotations[f.name]
            doc = f.metadata.get("doc", "")
            group = _without_none(annotation)
            if not _is_config(annotation):
                settings.append(Setting(f.name, _type_name(annotation), _default(f), doc))
            if _is_config(group):
                defaults = getattr(_default(f), "__dict__", {})
                for inner in group.describe():
                    default = defaults.get(inner.name, inner.default)
                    settings.append(inner._replace(name=f"{f.name}.{inner.name}", default=default))
        return settings


def _bounds(f: dataclasses.Field[Any]) -> Mapping[str, float | None]:
    return f.metadata.get("bounds", {})


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _checked(
    name: str,
    annotation: Any,
    value: Any,
    bounds: Mapping[str, float | None],
    faults: list[str],
    expected: str | None = None,
) -> Any:
    """``value`` as ``annotation`` asks for it; appends what is wrong with it to ``faults``."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    expected = expected or _type_name(annotation)
    if _is_union(annotation):
        if value is None and type(None) in members:
            return None
        others = [member for member in members if member is not type(None)]
        if len(others) == 1:
            return _checked(name, others[0], value, bounds, faults, expected)
        for member in others:
            found: list[str] = []
            result = _checked(name, member, value, bounds, found)
            if not found:
                return result
    elif _is_config(annotation):
        if isinstance(value, annotation):
            return value
        if isinstance(value, Mapping):
            return _from_mapping(annotation, value, f"{name}.", faults)
    elif origin is Literal:
        # 1 == True == 1.0, but they are not the same option.
        if any(value == option and type(value) is type(option) for option in members):
            return value
    elif origin is tuple and isinstance(value, (tuple, list)):
        variadic = len(members) == 2 and members[1] is Ellipsis
        if variadic or len(members) == len(value):
            types_ = members[:1] * len(value) if variadic else members
            return tuple(
                _checked(f"{name}[{i}]", member, item, bounds, faults)
                for i, (member, item) in enumerate(zip(types_, value, strict=True))
            )
    elif annotation is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an int beyond the largest float
            number = math.inf
        if not math.isfinite(number):
            faults.append(f"{name}: must be finite, was {number}")
            return value
        return _in_bounds(name, number, bounds, faults)
    elif annotation is int and (integer := as_int(value)) is not None:
        return _in_bounds(name, integer, bounds, faults)
    elif annotation in (bool, str) and isinstance(value, annotation):
        return value
    faults.append(f"{name}: must be {expected}, was {value!r}")
    return value


def _in_bounds(name: str, value: Any, bounds: Mapping[str, float | None], faults: list[str]) -> Any:
    for word, (symbol, holds) in _COMPARISONS.items():
        bound = bounds.get(word)
        if bound is not None and not holds(value, bound):
            faults.append(f"{name}: must be {symbol} {bound}, was {value}")
    return value


def _from_mapping(cls: type[ConfigType], values: Mapping[str, Any], prefix: str, faults: list[str]) -> ConfigType:
    """The configuration that ``values`` describe; with faults, what is returned means nothing."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(faults)
    faults += [f"{prefix}{name}: {_no_setting(str(name), fields)}" for name in values if name not in fields]
    unknown = len(faults) - before
    annotations = typing.get_type_hints(cls)
    arguments = {}
    for name, f in fields.items():
        if name in values:
            value = values[name]
            default = _default(f)
            if isinstance(default, Config) and isinstance(value, Mapping):
                # Settings that a nested mapping leaves out are those of this field's default, not of its class.
                value = merged(default.to_dict(), value)
            arguments[name] = _checked(prefix + name, annotations[name], value, _bounds(f), faults)
        elif _default(f) is dataclasses.MISSING:
            faults.append(f"{prefix}{name}: must be given")
    if len(faults) == before + unknown:
        try:
            return cls(**arguments)
        except ConfigError as error:
            faults += [prefix + fault for fault in error.faults]
    return typing.cast(ConfigType, values)


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """The names, three at most, that ``name`` may have been meant as, whatever its case."""
    folded = {other.casefold(): other for other in known}
    return [folded[other] for other in difflib.get_close_matches(name.casefold(), folded, n=3)]


def _no_setting(name: str, known: Iterable[str]) -> str:
    """What is wrong with a setting's name, with the ones that it may have been meant as.

    >>> _no_setting("learning_rate", ["steps", "optimizer.lr"])
    'is not a setting; did you mean optimizer.lr?'
    """
    known = list(known)
    close = _meant_names(name, known)
    if close:
        return f"is not a setting; did you mean {' or '.join(close)}?"
    return f"is not a setting; there are {', '.join(known) or 'none'}"


def _meant_names(name: str, known: list[str]) -> list[str]:
    """The settings, three at most, that ``name`` may have been meant as: in its own group first, then in others."""
    group, _, leaf = name.rpartition(".")
    leaf = _SYNONYMS.get(leaf.casefold(), leaf)
    pools = [[other for other in known if other.rpartition(".")[0] == group], known]
    for match in (lambda leaves: [leaf] if leaf in leaves else [], lambda leaves: close_names(leaf, leaves)):
        for pool in pools:
            leaves: dict[str, list[str]] = {}
            for other in pool:
                leaves.setdefault(other.rpartition(".")[2], []).append(other)
            if found := [other for close in match(leaves) for other in leaves[close]]:
                return found[:3]
    return []


def _set(
    cls: type[Config], values: dict[str, Any], name: str, value: Any, prefix: str, known: list[str], faults: list[str]
) -> None:
    """Puts the value, or what a text spells, into the nested dict ``values``, under the dotted ``name``."""
    target, owner = values, cls
    *parents, last = name.split(".")
    for depth, part in enumerate([*parents, last]):
        annotation = typing.get_type_hints(owner).get(part)
        if part not in (f.name for f in dataclasses.fields(owner)):
            faults.append(f"{name}: {_no_setting(prefix + name, known)}")
            return
        inner = _without_none(annotation)
        if depth == len(parents):
            is_none = value is None or (isinstance(value, str) and value.lower() in _NONE)
            if _is_config(inner) and isinstance(value, Mapping):
                for key, each in value.items():
                    _set(cls, values, f"{name}.{key}", each, prefix, known, faults)
            elif _is_config(inner) and not is_none:
                settings = ", ".join(f"{name}.{f.name}" for f in dataclasses.fields(inner))
                faults.append(f"{name}: is a group of settings, set one of {settings}")
            else:
                try:
                    target[part] = _parsed(annotation, value) if isinstance(value, str) else value
                except ValueError:
                    faults.append(f"{name}: must be {_type_name(annotation)}, was {value!r}")
        elif _is_config(inner):
            owner = inner
            nested = target.get(part)
            nested = nested if isinstance(nested, dict) else {}
            target[part] = nested
            target = nested
        else:
            faults.append(f"{name}: {'.'.join(parents[: depth + 1])} is no group of settings")
            return


# What other libraries call a setting.
_SYNONYMS = {
    "learning_rate": "lr",
    "ema": "decay",
    "batchsize": "batch_size",
    "num_epochs": "epochs",
    "num_steps": "steps",
}
_NONE = ("none", "null")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _parsed(annotation: Any, text: str) -> Any:
    """The value of a command line's text; a ValueError if it does not spell one of this type."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    text = text.strip()
    if _is_union(annotation):
        if type(None) in members and text.lower() in _NONE:
            return None
        for member in members:
            try:
                return _parsed(member, text)
            except ValueError:
                continue
        raise ValueError(text)
    if origin is Literal:
        for option in members:
            if str(option) == text:
                return option
        raise ValueError(text)
    if origin is tuple:
        inside = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        items = inside.removesuffix(",").split(",") if inside.strip() else []
        variadic = len(members) == 2 and members[1] is Ellipsis
        if not variadic and len(items) != len(members):
            raise ValueError(text)
        types_ = members[:1] * len(items) if variadic else members
        return [_parsed(member, item) for member, item in zip(types_, items, strict=True)]
    if annotation is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text.lower()]
    if annotation in (int, float):
        return annotation(text)
    if annotation is str:
        return text
    raise ValueError(text)


def _without_none(annotation: Any) -> Any:
    others = [member for member in typing.get_args(annotation) if member is not type(None)]
    return others[0] if _is_union(annotation) and len(others) == 1 else annotation


def _type_name(annotation: Any) -> str:
    """The type in words: ``an integer``, ``one of 'mlp', 'conv'``, ``a tuple of 2 values (...)``."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        return " or ".join(_type_name(member) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in members)
    if origin is tuple:
        if len(members) == 2 and members[1] is Ellipsis:
            return f"a tuple, each item {_type_name(members[0])}"
        return f"a tuple of {len(members)}: {', '.join(_type_name(member) for member in members)}"
    if _is_config(annotation):
        return f"the settings of {annotation.__name__}"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "none"}
_COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested settings ``base`` with those of ``over`` in place of them, group by group."""
    result = {name: merged(value, {}) if isinstance(value, Mapping) else value for name, value in base.items()}
    for name, value in over.items():
        inner = result.get(name)
        result[name] = merged(inner if isinstance(inner, dict) else {}, value) if isinstance(value, Mapping) else value
    return result
