"""A picture of a report, as PNG: how many times as long peers take, for a few cases. For a README."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gencore.bench import text
from gencore.bench.charts import positive
from gencore.bench.results import OURS, Candidate, Report, Result
from gencore.files import write_atomically

_INK, _MUTED, _RULE, _PAPER = "#1b1f24", "#57606a", "#d0d7de", "#ffffff"
_OTHER = "best other"
# Apart in lightness, so that they stay apart in grey and for the colour blind.
# The quicker one, where there are several ways to compile.
_COMPILED = "best of torch.compile"
_COLOURS = {"eager": "#0f5873", _COMPILED: "#3f9cbd", _OTHER: "#b3bcc6"}
# Pixels, and inches at 100 pixels each, saved at twice that for sharp screens.
_WIDTH, _BAR, _GAP, _HEAD, _FOOT = 8.0, 0.19, 0.24, 1.05, 0.72
# A letter of a name or a figure, on the average.
_LETTER = 0.068


class _Bar(NamedTuple):
    label: str
    peer: Candidate


Drawn = Sequence[tuple[Result, Sequence[_Bar]]]


def chosen(report: Report) -> tuple[Result, ...]:
    """For each op, and each use of it, the largest case in float32 that was held against a peer."""
    largest: dict[tuple[str, str], Result] = {}
    for result in report.results:
        if result.section == "ops" and result.dtype == "float32" and _bars(result):
            key = result.op, result.benchmark
            if key not in largest or (result.nbytes, result.flops) > (largest[key].nbytes, largest[key].flops):
                largest[key] = result
    return tuple(largest.values())


def save(report: Report, path: Path | str, rows: Sequence[Result] | None = None) -> None:
    """Draws the ratios as bars and writes the picture, whole or not at all.

    Args:
        report: of which machine, date and commit are told.
        path: of the PNG file.
        rows: what is drawn, from the top down; left out, :func:`chosen`.

    Raises:
        ValueError: there is nothing to draw: no row has a peer that ran and computes the same.
    """
    drawn = [(result, bars) for result in (chosen(report) if rows is None else rows) if (bars := _bars(result))]
    if not drawn:
        raise ValueError("rows must hold a result with a peer that ran and computes the same, got none")
    write_atomically(path, _draw(report, drawn))


def _bars(result: Result) -> tuple[_Bar, ...]:
    """The best of each of three kinds of peers that ran and compute the same; none where ours does not."""
    able: dict[str, Candidate] = {}
    for peer in result.peers:
        if not positive(peer.ratio) or not result.agrees(peer) or peer.name.startswith(OURS):
            continue
        kind = _COMPILED if "compile" in peer.name else "eager" if peer.name.startswith("eager") else _OTHER
        if kind not in able or peer.ratio < (able[kind].ratio or peer.ratio):
            able[kind] = peer
    if not result.agrees(result.ours):
        return ()
    return tuple(_Bar(kind, able[kind]) for kind in _COLOURS if kind in able)


def _draw(report: Report, drawn: Drawn) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    places, height = _places([len(bars) for _, bars in drawn])
    total = height + _HEAD + _FOOT
    figure = Figure(figsize=(_WIDTH, total), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    names = max(len(line) for result, _ in drawn for line in _names(result))
    left = min(max(names * _LETTER + 0.45, 2.0), 3.6) / _WIDTH
    axes = figure.add_axes((left, _FOOT / total, 0.975 - left, height / total))
    kinds = [kind for kind in _COLOURS if any(bar.label == kind for _, bars in drawn for bar in bars)]
    low, high = _range(drawn, (0.975 - left) * _WIDTH)
    for (result, bars), ys in zip(drawn, places, strict=True):
        for bar, y in zip(bars, ys, strict=True):
            _draw_bar(axes, bar, y)
        middle = (ys[0] + ys[-1]) / 2
        _name(axes, result, middle)
    axes.set(xscale="log", xlim=(low, high), ylim=(height, 0), yticks=[])
    _ticks(axes, low, high)
    axes.axvline(1, color=_INK, linewidth=1.3, zorder=3)
    title = _title(report)
    # A long name of a machine is written smaller.
    words: dict[str, Any] = {"parse_math": False, "va": "top"}
    size = min(12.5, 12.5 * 66 / len(title))
    figure.text(0.02, 1 - 0.16 / total, title, color=_INK, fontsize=size, fontweight="bold", **words)
    subtitle = "Time of each peer over that of gencore: to the right of 1, gencore is faster. Logarithmic scale."
    figure.text(0.02, 1 - 0.45 / total, subtitle, color=_MUTED, fontsize=9.5, **words)
    figure.text(0.02, 0.28 / total, _source(report), color=_MUTED, fontsize=8.5, **words)
    figure.legend(
        [Patch(color=_COLOURS[kind]) for kind in kinds], kinds,
        loc="upper left", bbox_to_anchor=(left - 0.012, 1 - 0.62 / total), ncols=len(kinds),
        frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=1.1, columnspacing=1.5, borderaxespad=0,
    )  # fmt: skip
    buffer = io.BytesIO()
    # Nothing of the day in the file: the same report makes the same bytes.
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _places(counts: Sequence[int]) -> tuple[list[list[float]], float]:
    """Where the bars of each group stand, in inches from the top, and how high they are together."""
    places, y = [], _GAP / 2
    for count in counts:
        # Two lines of names need as much as two bars.
        room = max(count, 2) * _BAR
        first = y + (room - count * _BAR) / 2 + _BAR / 2
        places.append([first + _BAR * number for number in range(count)])
        y += room + _GAP
    return places, y - _GAP / 2


def _draw_bar(axes: Any, bar: _Bar, y: float) -> None:
    ratio, (low, high) = bar.peer.ratio or 1.0, bar.peer.bounds
    slower = bar.peer.verdict == "slower"
    axes.barh(
        y, ratio - 1, left=1, height=_BAR * 0.84, color=_COLOURS[bar.label], zorder=2,
        edgecolor=_INK if slower else "none", hatch="////" if slower else None, linewidth=0.5 if slower else 0,
    )  # fmt: skip
    axes.plot([low, high], [y, y], color=_INK, linewidth=1, solid_capstyle="butt", zorder=4)
    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "parse_math": False}
    axes.annotate(_figure(bar), (max(ratio, high, 1), y), (4, 0), fontsize=8.5, color=_INK, **place)


def _figure(bar: _Bar) -> str:
    name = f", {_short(bar.peer.name, 20)}" if bar.label == _OTHER else ""
    return text.times(bar.peer.ratio) + name + (", gencore slower" if bar.peer.verdict == "slower" else "")


def _name(axes: Any, result: Result, y: float) -> None:
    from matplotlib.transforms import blended_transform_factory

    place = blended_transform_factory(axes.figure.transFigure, axes.transData)
    title, case = _names(result)
    axes.text(0.02, y - 0.085, title, transform=place, va="center", fontsize=9.5, color=_INK, parse_math=False)
    axes.text(0.02, y + 0.095, case, transform=place, va="center", fontsize=8.5, color=_MUTED, parse_math=False)


def _names(result: Result) -> tuple[str, str]:
    case = result.case if result.dtype == "float32" else f"{result.case}, {result.dtype}"
    return _short(f"{result.op}, {result.benchmark}".replace("_", " "), 47), _short(case, 47)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _range(drawn: Drawn, width: float) -> tuple[float, float]:
    """Of an axis of so many inches: with room for the figures to the right of the bars."""
    ends = [(bar.peer.bounds, bar.peer.ratio or 1.0, bar) for _, bars in drawn for bar in bars]
    low = min(0.8, *(min(interval[0], ratio) for interval, ratio, _ in ends)) / 1.08
    reach = [math.log(1.6 / low)]
    for interval, ratio, bar in ends:
        free = width - len(_figure(bar)) * _LETTER - 0.12
        reach.append(math.log(max(interval[1], ratio, 1.0) / low) * width / max(free, width / 4))
    return low, low * math.exp(max(reach))


def _ticks(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import NullLocator

    decades = range(-6, 9)
    marks = [step * 10.0**power for power in decades for step in ((1, 2, 5) if high / low < 300 else (1,))]
    marks = [mark for mark in marks if low <= mark <= high]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(marks, [f"{mark:g}×" for mark in marks], fontsize=9)
    axes.tick_params(axis="x", length=0, labelcolor=_MUTED)
    axes.grid(axis="x", color=_RULE, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _title(report: Report) -> str:
    threads = report.machine.get("threads")
    on_gpu = report.machine.get("device") == "cuda"
    told = "" if threads is None or on_gpu else f", {threads} thread{'' if threads == 1 else 's'}"
    return _short(f"gencore on {report.machine.get('name', 'an unknown machine')}", 76) + told


def _source(report: Report) -> str:
    torch, quick = report.versions.get("torch"), report.settings.get("quick")
    parts = [
        f"gencore {_short(report.commit, 40)}",
        torch and f"torch {torch}",
        report.date[:10],
        quick and "a quick run",
    ]
    return ", ".join(part for part in parts if part) + ". Lines: 95% intervals."
