"""Figures as people read them, for the terminal, the page, the picture and the documentation."""

from __future__ import annotations

import math

from gencore.bench.results import Interval

_PREFIXES = ("", "k", "M", "G", "T", "P")


def seconds(value: float | None) -> str:
    """With three digits, in the unit that has them before the point: "12.3 µs"."""
    if value is None or not math.isfinite(value):
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale * 0.9995:
            return f"{_three_digits(value / scale)} {unit}"
    return f"{_three_digits(value * 1e9)} ns"


def times(value: float | None) -> str:
    """A ratio: "2.31", "12.3", "104"."""
    return "–" if value is None or not math.isfinite(value) else _three_digits(value)


def interval(value: Interval | None) -> str:
    return "–" if value is None else f"{times(value[0])} to {times(value[1])}"


def share(value: float | None) -> str:
    """A part of 1 in percent; of what is below 1% that it is."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0%}" if value >= 0.01 else "<1%"


def rate(value: float, unit: str) -> str:
    """A figure per second: ``rate(1.3e11, "B/s")`` is "130 GB/s"."""
    if not math.isfinite(value) or value <= 0:
        return "–"
    power = min(max(int(math.log10(value) // 3), 0), len(_PREFIXES) - 1)
    return f"{_three_digits(value / 1000**power)} {_PREFIXES[power]}{unit}"


def size(nbytes: int | None) -> str:
    """Bytes, in units of 1024: "15.0 MiB"."""
    if nbytes is None:
        return "–"
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{_three_digits(value)} {unit}"


def error(value: float | None) -> str:
    if value is None:
        return "–"
    return "NaN or infinite" if not math.isfinite(value) else f"{value:.1e}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
