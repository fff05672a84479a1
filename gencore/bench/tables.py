"""A table of cases of the user's own, from a JSON file: the shapes of the user's own networks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gencore._ops import OPS
from gencore.bench.case import AttentionCase, Case

_WHY = "a case of the user's own"
_VIDEO = ("channels_last_3d",)
_FORMATS = ("contiguous", "channels_last", *_VIDEO)
# The layouts that attention takes besides: dense heads, and what a linear layer leaves.
_OF_ATTENTION = ("heads", "tokens", "contiguous", "channels_last")
_SIZES = ("batch", "heads", "queries", "keys", "size")
# The keys that cases of an op may have besides its shape and layout.
_MORE = {op.stem: tuple(op.keys) for op in OPS}


class CasesError(ValueError):
    """A file that should be a table of cases and is none."""


@dataclass(frozen=True)
class Table:
    """The cases by op."""

    path: str
    cases: Mapping[str, tuple[Case | AttentionCase, ...]]

    def of(self, op: str) -> tuple[Case | AttentionCase, ...]:
        """Those of an op; none where the file has none."""
        return self.cases.get(op, ())

    def __str__(self) -> str:
        return self.path


def read_table(path: Path | str) -> Table:
    """The table in a JSON file: an object of lists of cases, by op.

    A case of ``attention`` has ``batch``, ``heads``, ``queries``, ``size``, and ``keys`` if there are others than
    queries; its ``layout`` is heads (the default), tokens, or for images contiguous or channels_last. Other cases have
    a ``shape`` and a ``layout``, contiguous (the default), channels_last or channels_last_3d; those of ``group_norm``
    have ``groups``, and those of ``reparameterize`` may have ``draws``. Any case may have a ``why``.

    Raises:
        CasesError: the file cannot be read, or is no such table; the message says where.
    """
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise CasesError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CasesError(f"{path} is no JSON table: {error}") from None
    if not isinstance(told, dict) or not told:
        raise CasesError(f"{path} must be an object of lists of cases by op, got {_kind(told)}")
    found = {}
    for op, cases in told.items():
        if op not in _MORE:
            raise CasesError(f"{path}: op must be one of {', '.join(_MORE)}, got {op!r}")
        if not isinstance(cases, list) or not cases:
            raise CasesError(f"{path}: {op} must be a list of cases, got {_kind(cases)}")
        made = [_case(op, case, f"{path}: {op}[{i}]") for i, case in enumerate(cases)]
        if len({str(case) for case in made}) < len(made):
            raise CasesError(f"{path}: {op} must have every case once only")
        found[op] = tuple(made)
    return Table(str(path), found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which JSON would keep the last of several values for a key."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the key {twice[0]!r} is there more than once")
    return dict(pairs)


def _case(op: str, told: Any, where: str) -> Case | AttentionCase:
    if not isinstance(told, dict):
        raise CasesError(f"{where} must be an object, got {_kind(told)}")
    known = (*(_SIZES if op == "attention" else ("shape", *_MORE[op])), "layout", "why")
    if unknown := [key for key in told if key not in known]:
        raise CasesError(f"{where} has an unknown key {unknown[0]!r}; there are {', '.join(known)}")
    get = _Reader(told, where)
    why = get.text("why", _WHY)
    return _attention(get, why) if op == "attention" else _plain(op, get, why)


def _attention(get: _Reader, why: str) -> AttentionCase:
    batch, heads, queries, size = (get.size(name) for name in ("batch", "heads", "queries", "size"))
    keys, layout = get.size("keys", queries), get.text("layout", "heads", _OF_ATTENTION)
    if layout not in ("heads", "tokens") and keys != queries:
        raise get.fault("keys", f"queries, {queries}, in images", keys)
    return AttentionCase(batch, heads, queries, keys, size, why, layout=layout)


def _plain(op: str, get: _Reader, why: str) -> Case:
    shape = get.shape()
    least = 3 if op == "group_norm" else 1
    if len(shape) < least:
        raise get.fault("shape", f"at least {least} sizes", list(shape))
    layout = get.text("layout", "contiguous", _FORMATS)
    if layout != "contiguous" and len(shape) != (wanted := 5 if layout in _VIDEO else 4):
        raise get.fault("layout", f"contiguous for a shape of {len(shape)} sizes: it needs {wanted}", layout)
    draws = get.size("draws") if "draws" in get.told else None
    groups = get.size("groups") if op == "group_norm" else 1
    if op == "group_norm" and shape[1] % groups:
        raise get.fault("groups", f"a divisor of the {shape[1]} channels", groups)
    return Case(shape, why, layout=layout, draws=draws, groups=groups)


@dataclass(frozen=True)
class _Reader:
    """The values of one case, each checked as it is taken."""

    told: Mapping[str, Any]
    where: str

    def fault(self, key: str, wanted: str, value: Any) -> CasesError:
        return CasesError(f"{self.where}: {key} must be {wanted}, got {value!r}")

    def _taken(self, key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        if key not in self.told and default is None:
            raise CasesError(f"{self.where}: {key} is missing; it must be {wanted}")
        value = self.told.get(key, default)
        if not fits(value):
            raise self.fault(key, wanted, value)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        found: int = self._taken(key, default, _is_size, "an integer of at least 1")
        return found

    def shape(self) -> tuple[int, ...]:
        def fits(value: Any) -> bool:
            return isinstance(value, list) and bool(value) and all(map(_is_size, value))

        return tuple(self._taken("shape", None, fits, "a list of integers of at least 1"))

    def text(self, key: str, default: str, allowed: tuple[str, ...] = ()) -> str:
        wanted = f"one of {', '.join(allowed)}" if allowed else "a text"
        found: str = self._taken(
            key, default, lambda value: isinstance(value, str) and (not allowed or value in allowed), wanted
        )
        return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _kind(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ([], {}) else type(value).__name__
