"""``gencore runs``: the runs below a folder, how far each came and with which figures."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gencore.cli.common import UserError, folder_or_file, one_line, print_table
from gencore.train.checkpoint import Checkpoint, CheckpointError, Run, checkpoints, read, read_run
from gencore.train.log import read_metrics

_VALIDATION = "validation/"


@dataclass(frozen=True)
class Best:
    """The lowest loss on test images, of the first phase."""

    phase: str
    loss: float
    step: int


@dataclass(frozen=True)
class Told:
    """What there is to say of a run; None where the run does not say.

    Attributes:
        run: its folder.
        model, data: their names.
        step, total: the step of the last figures, and the number of steps that the run is to have.
        losses: by phase, the last ones; None for a loss that is not finite.
        best: the lowest validation loss.
        seconds: spent on training.
        checkpoint: the step of the newest checkpoint.
        saved: when that was written, in ISO 8601.
        fault: why the run, or its newest checkpoint, cannot be read.
    """

    run: str
    model: str | None = None
    data: str | None = None
    step: int | None = None
    total: int | None = None
    losses: Mapping[str, float | None] | None = None
    best: Best | None = None
    seconds: float | None = None
    checkpoint: int | None = None
    saved: str | None = None
    fault: str | None = None


def command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", parser=folder_or_file, help="A folder with runs, at any depth.")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """List the runs below a folder: model, data, steps, losses, and the date of the newest checkpoint."""
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}")
    found = [told(path) for path in sorted(folders(directory))]
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1, allow_nan=False))
    elif found:
        print_table(rows(found))
    else:
        print(f"there is no run in {directory}")


def folders(directory: Path) -> Iterator[Path]:
    """The folders with a ``run.json``: this one, and those below it. Links are not followed."""
    for place, inner, files in os.walk(directory):
        if "run.json" in files:
            yield Path(place)
            # A run's checkpoints are many, and hold no runs.
            inner[:] = [name for name in inner if name != "checkpoints"]


def told(directory: Path) -> Told:
    """What a run says of itself; the fault, and what else can be known, if it is damaged."""
    run: Run | None = None
    records: list[dict[str, Any]] = []
    newest: Checkpoint | None = None
    saved = fault = None
    try:
        run = read_run(directory)
        records = read_metrics(directory / "metrics.jsonl")
        if found := checkpoints(directory):
            newest = read(found[-1])
            saved = _written(newest.directory)
    except CheckpointError as error:
        fault = str(error)
    except OSError as error:
        fault = f"{error.filename or directory}: {error.strerror or error}"
    if run is None:
        return Told(str(directory), fault=fault)
    last: dict[str, Any] = next((record for record in reversed(records) if _losses(record)), {})
    state = {} if newest is None else newest.state
    steps = [record["step"] for record in records] + ([] if newest is None else [newest.step])
    # A run that was made longer says so before its next checkpoint does; one without training has no steps at all.
    planned = state.get("total_steps")
    total = planned if planned == 0 else run.train.get("steps") or planned
    return Told(
        run=str(directory),
        model=run.model,
        data=run.data,
        step=max(steps, default=0),
        total=total if isinstance(total, int) else None,
        losses=_losses(last),
        best=_best(records),
        seconds=_number(records[-1].get("seconds") if records else state.get("seconds")),
        checkpoint=None if newest is None else newest.step,
        saved=saved,
        fault=fault,
    )


def rows(found: Sequence[Told]) -> list[tuple[str, ...]]:
    """The table, its first row the names of the columns."""
    table: list[tuple[str, ...]] = [
        ("run", "model", "data", "step", "losses", "best validation loss", "seconds", "saved", "")
    ]
    for each in found:
        best = "" if each.best is None else f"{each.best.phase} {each.best.loss:.4g} at step {each.best.step:,}"
        saved = "" if each.saved is None else datetime.datetime.fromisoformat(each.saved).strftime("%Y-%m-%d %H:%M")
        if saved and each.checkpoint != each.step:
            saved += f", step {each.checkpoint:,}"
        cells = (
            each.run,
            each.model or "",
            each.data or "",
            "" if each.step is None else f"{each.step:,}" + ("" if each.total is None else f" of {each.total:,}"),
            ", ".join(f"{name} {_in_words(loss)}" for name, loss in (each.losses or {}).items()),
            best,
            "" if each.seconds is None else f"{each.seconds:,.0f}",
            saved,
            each.fault or "",
        )
        table.append(tuple(one_line(cell) for cell in cells))
    # Few runs are validated; where none is, the column takes no place.
    kept = [i for i, name in enumerate(table[0]) if name != "best validation loss" or any(each.best for each in found)]
    return [tuple(row[i] for i in kept) for row in table]


def _losses(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The losses of a line of the log by phase, those on test images left out."""
    names = [name for name in record if name.endswith("/loss") and not name.startswith(_VALIDATION)]
    return {name.removesuffix("/loss"): _number(record[name]) for name in names}


def _best(records: Sequence[Mapping[str, Any]]) -> Best | None:
    validated = [name for record in records for name in record if name.startswith(_VALIDATION)]
    if not validated:
        return None
    name = validated[0]
    figures = [(figure, record["step"]) for record in records if (figure := _number(record.get(name))) is not None]
    if not figures:
        return None
    loss, step = min(figures)
    return Best(name.removeprefix(_VALIDATION).removesuffix("/loss"), loss, step)


def _number(value: Any) -> float | None:
    """A figure of a file that may be damaged; None for what is no finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _in_words(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4g}"


def _written(directory: Path) -> str:
    """When a checkpoint was written, in the local time zone."""
    moment = datetime.datetime.fromtimestamp((directory / "checkpoint.json").stat().st_mtime)
    return moment.astimezone().isoformat(timespec="seconds")
