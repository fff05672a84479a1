"""``gencore bench``: what each kernel gains over what users have now, how near to the limit it is, where it loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gencore.bench import cases, compare, page, run, suite, terminal
from gencore.bench.compare import Compared
from gencore.bench.results import Report, Result, read
from gencore.cli.common import UserError, folder_or_file
from gencore.train.trainer import choose_device

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in cases.DTYPES}
# How often what seems to have lost is measured again: noise rarely strikes the same case three times.
_AGAIN = 2


def _dtypes(text: str) -> list[torch.dtype]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _DTYPES]:
        raise UserError(f"--dtype must be some of {','.join(_DTYPES)}, got {unknown[0]!r}")
    return [_DTYPES[name] for name in dict.fromkeys(names)]


def _shapes(text: str) -> str | cases.Table:
    if text in ("timed", "all", *cases.PRESETS):
        return text
    if not Path(text).exists():
        raise UserError(f"--shapes must be timed, all, {', '.join(cases.PRESETS)} or a JSON file, got {text!r}")
    return cases.read_table(text)


def command(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help=f"{', '.join(suite.OPS)}; unet; training.  [default: all]"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="What to time.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="[default: those that the op is used at]")
    ] = None,
    shapes: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help=f"timed, {', '.join(cases.PRESETS)}, all, or a JSON file of cases."),
    ] = "timed",
    quick: Annotated[bool, typer.Option("--quick", help="One case of each, few rounds, nothing compiled.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="With torch.compile among the peers.  [default: unless --quick]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=4096, help="On the CPU.  [default: torch's]")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", parser=folder_or_file, help="Write the report.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=folder_or_file, help="Write it as a page to look at.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="OLD.json",
            parser=folder_or_file,
            help="Compare with an older report by ratios to the peers; exit code 1 if anything lost more than 15%.",
        ),
    ] = None,
) -> int:
    """Time kernels in turn with their peers, and against what this machine can do."""
    chosen = choose_device(device).type
    before = None if against is None else read(against)
    try:
        tasks = suite.tasks(
            ops or (),
            device=chosen,
            dtypes=() if dtype is None else _dtypes(dtype),
            shapes=_shapes(shapes),
            quick=quick,
        )
    except cases.CasesError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    settings = run.QUICK if quick else run.Settings()
    if compiled is not None:
        settings = settings._replace(compile=compiled)
    out = terminal.console()
    for path in (json, html):
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a folder, and no file can be written there")
    with _threads(threads):
        try:
            report = _run(tasks, chosen, settings, out)
        except run.Interrupted as interrupted:
            # Minutes of measuring are not thrown away.
            _written(interrupted.report, json, html, out)
            raise
        compared = None
        if before is not None:
            report, compared = _compared(tasks, chosen, settings, report, before, out)
    for line in (*terminal.notes(report.results), "", *terminal.summary(report), terminal.limits(report)):
        out.print(line, markup=False)
    _written(report, json, html, out)
    return 0 if compared is None else _verdict(compared, out)


def _written(report: Report, json: Path | None, html: Path | None, out: Console) -> None:
    if json is not None:
        report.write(json)
        out.print(f"{json}: the report", markup=False)
    if html is not None:
        page.write(report, html)
        out.print(f"{html}: the page", markup=False)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(tasks: list[suite.Task], device: str, settings: run.Settings, out: Console) -> Report:
    """Runs the tasks with a bar on stderr, and prints the table of each benchmark as soon as it is whole."""
    waiting: list[Result] = []

    def show() -> None:
        if waiting:
            out.print(terminal.table(waiting))
            waiting.clear()

    def keep(result: Result) -> None:
        if waiting and (waiting[0].op, waiting[0].benchmark) != (result.op, result.benchmark):
            show()
        waiting.append(result)

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    stderr = terminal.console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        bar = progress.add_task("", total=len(tasks))

        def on_progress(done: int, name: str) -> None:
            progress.update(bar, completed=done, description=name)

        report = run.run(tasks, device, settings, on_progress, keep)
    show()
    return report


def _compared(
    tasks: list[suite.Task], device: str, settings: run.Settings, report: Report, before: Report, out: Console
) -> tuple[Report, Compared]:
    """Compares, and measures again what seems to have lost: the better of the measurements counts."""
    compared = compare.compare(report, before)
    for _ in range(_AGAIN):
        doubtful = [task for task in tasks if task.name in compared.lost()]
        if not doubtful:
            break
        out.print(f"{len(doubtful)} seem to have lost and are measured again", markup=False)
        again = {result.name: result for result in run.run(doubtful, device, settings).results}
        results = [compare.better(result, again.get(result.name, result)) for result in report.results]
        report = dataclasses.replace(report, results=tuple(results))
        compared = compare.compare(report, before)
    return report, compared


def _verdict(compared: Compared, out: Console) -> int:
    for warning in compared.warnings:
        out.print(f"(other than before: {warning})", markup=False)
    if not compared.changes and not compared.failed:
        raise UserError("--compare: the two reports have no case and peer in common")
    lost, gained = compared.lost(), compared.gained()
    if lost or gained or compared.failed:
        out.print(terminal.changes(compared))
    out.print(
        f"{len(compared.changes)} compared with the older report: {len(lost)} lost more than {compare.MARGIN:.0%}, "
        f"{len(gained)} gained, {len(compared.failed)} fail that did not; {len(compared.missing)} of it were not run",
        markup=False,
    )
    return 1 if lost or compared.failed else 0
