"""``gencore compare``: the figures of several runs, side by side."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gencore import pictures
from gencore.cli.common import UserError, check_output, folder_or_file, one_line, picture_file, print_table, report, say
from gencore.train.checkpoint import read_run
from gencore.train.log import read_metrics

Better = Literal["lower", "higher"]

# What evaluations hold beside the figures of features: where, what it is called, what is better.
_OTHERS: tuple[tuple[tuple[str, ...], str, Better], ...] = (
    (("bound", "bits_per_dimension"), "bits/dim at most, one draw", "lower"),
    (("bound_k", "bits_per_dimension"), "bits/dim at most, more draws", "lower"),
    (("classes", "effective_classes"), "effective classes", "higher"),
    (("classes", "confident"), "confidence above 0.9", "higher"),
    (("conditional", "accuracy"), "accuracy of the classes asked for", "higher"),
    (("reconstruction", "psnr"), "reconstructions: PSNR, dB", "higher"),
    (("reconstruction", "ssim"), "reconstructions: SSIM", "higher"),
)


@dataclass(frozen=True)
class Row:
    """One figure of every run: None for a run that has none.

    Attributes:
        name: of the figure.
        better: what is better.
        values: by run, in their order.
        intervals: 95%, where they are known.
    """

    name: str
    better: Better
    values: tuple[float | None, ...]
    intervals: tuple[tuple[float, float] | None, ...]


def command(
    directories: Annotated[
        list[Path], typer.Argument(metavar="RUN...", parser=folder_or_file, help="Folders of runs, evaluated before.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", parser=picture_file, help="Draw the figures and curves too.")
    ] = None,
) -> None:
    """Compare runs by what gencore evaluate found: a table, the best of each row marked; and a picture."""
    if out is not None:
        check_output(out)
    names = names_of(directories)
    evaluations = [_evaluation(directory) for directory in directories]
    say(_differences(names, evaluations))
    rows = compared(evaluations)
    print_table(table(names, rows))
    if out is not None:
        curves = {name: read_metrics(path / "metrics.jsonl") for name, path in zip(names, directories, strict=True)}
        pictures.save(drawn(names, rows, curves), out)
        report(out, f"figures of {len(names)} runs")


def names_of(directories: Sequence[Path]) -> list[str]:
    """The runs by the last part of their paths, or by all of them where that is not enough."""
    last = [path.resolve().name for path in directories]
    return last if len(set(last)) == len(last) else [str(path) for path in directories]


def _evaluation(directory: Path) -> dict[str, Any]:
    read_run(directory)
    path = directory / "evaluation.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} has not been measured; do it with: gencore evaluate {directory}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; write it anew with: gencore evaluate {directory}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no evaluation; write it anew with: gencore evaluate {directory}")
    return found


def _differences(names: Sequence[str], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes of what keeps figures from being compared: other data, other numbers of samples."""
    notes = []
    whats = {
        "data": lambda told: told.get("data"),
        "number of samples": lambda told: _at(told, ("frechet", "samples")) or _at(told, ("measures", 0, "samples")),
    }
    for what, of in whats.items():
        values = [of(told) for told in evaluations]
        if len({str(value) for value in values if value is not None}) > 1:
            each = ", ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
            notes.append(f"the runs were not measured by the same {what} ({each}): figures differ by that too")
    return notes


def _at(told: Any, path: Sequence[str | int]) -> Any:
    """What lies at a path of names and numbers; None where nothing does."""
    for name in path:
        try:
            told = told[name]
        except (KeyError, IndexError, TypeError):
            return None
    return told


def compared(evaluations: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for every figure that at least one evaluation has."""
    rows = []
    for path, name, better in _OTHERS:
        values = tuple(_number(_at(told, path)) for told in evaluations)
        if any(value is not None for value in values):
            rows.append(Row(name, better, values, (None,) * len(values)))
    named: dict[str, Better] = {}
    figures: list[dict[str, Any]] = []
    for told in evaluations:
        measures = [each for one in told.get("measures") or () for each in _at(one, ("figures",)) or ()]
        figures.append({each["name"]: each for each in measures})
        named |= {each["name"]: each["better"] for each in measures}
    for name, better in named.items():
        values = tuple(_number(_at(each, (name, "value"))) for each in figures)
        bounds = [[_number(_at(each, (name, "interval", i))) for i in range(2)] for each in figures]
        intervals = tuple(None if low is None or high is None else (low, high) for low, high in bounds)
        rows.append(Row(name, better, values, intervals))
    return rows


def table(names: Sequence[str], rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Rows of figures, columns of runs; a star behind the best of each row, if there are several."""
    cells: list[tuple[str, ...]] = [("", *map(one_line, names), "better")]
    for row in rows:
        there = [value for value in row.values if value is not None]
        best = (min if row.better == "lower" else max)(there, default=None)
        marked = len(there) > 1
        values = [
            "" if value is None else f"{value:.4g}" + (" *" if marked and value == best else "") for value in row.values
        ]
        cells.append((row.name, *values, row.better))
    return cells


def drawn(names: Sequence[str], rows: Sequence[Row], curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG: a panel of bars with intervals for each figure, and one of curves for each measure of the trainings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [key for key in _keys(curves) if key.startswith("measure/")]
    panels, columns = len(rows) + len(measured), 3
    lines = max(1, math.ceil(panels / columns))
    figure = Figure(figsize=(4.2 * columns, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in places[panels:]:
        axes.set_visible(False)
    for axes, row in zip(places, rows, strict=False):
        heights = [math.nan if value is None else value for value in row.values]
        pairs = zip(heights, row.intervals, strict=True)
        spans = [(0.0, 0.0) if span is None else (max(0, x - span[0]), max(0, span[1] - x)) for x, span in pairs]
        axes.bar(range(len(names)), heights, yerr=list(zip(*spans, strict=True)), color="#7a9cc6", capsize=3)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_title(f"{row.name} ({row.better} is better)", fontsize=9)
    for axes, key in zip(places[len(rows) :], measured, strict=False):
        for name, records in curves.items():
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set_title(key.removeprefix("measure/"), fontsize=9)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=8)
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _keys(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(key for records in curves.values() for record in records for key in record))


def _number(value: Any) -> float | None:
    """A figure of a file that may be damaged; None for what is no finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
