"""``gencore bench``: what each kernel gains over what users have now, how near to the limit it is, where it loses."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gencore.bench import cases, compare, run, suite, terminal
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
        list[Path] | None,
        typer.Option(
            "--compare",
            metavar="OLD.json",
            parser=folder_or_file,
            help="Compare with an older report by ratios to the peers; exit code 1 if anything lost more than 15%. "
            "Several reports of one machine tell how much ratios move by themselves: repeatable.",
        ),
    ] = None,
) -> int:
    """Time kernels in turn with their peers, and against what this machine can do."""
    chosen = choose_device(device).type
    before = [read(path) for path in against or ()]
    dtypes, wanted = () if dtype is None else _dtypes(dtype), _shapes(shapes)
    choice: dict[str, Any] = {
        "names": tuple(ops or ()),
        "device": chosen,
        "dtypes": dtypes,
        "shapes": wanted,
        "quick": quick,
    }
    try:
        tasks = suite.tasks(**choice)
    except ValueError as error:
        raise UserError(str(error)) from None
    # All that can be refused is refused before minutes are spent.
    wanted_names = {task.name for task in tasks}
    for older, old in zip(against or (), before, strict=True):
        if not wanted_names & {result.name for result in old.results}:
            raise UserError(f"--compare: {older} has none of the cases that are to be run")
    for option, path in (("--json", json), ("--html", html)):
        _check_writable(option, path)
    settings = run.QUICK if quick else run.Settings()
    if compiled is not None:
        settings = settings._replace(compile=compiled)
    out = terminal.console()
    with _threads(threads):
        try:
            report = _run(tasks, chosen, settings, out)
        except run.Interrupted as interrupted:
            # Minutes of measuring are not thrown away, nor is what an earlier run has written for nothing.
            if interrupted.report.results:
                _say(out, f"interrupted after {len(interrupted.report.results)} of {len(tasks)}")
                _written(interrupted.report, json, html, out)
            raise
        _written(report, json, html, out)
        _say(out, *terminal.notes(report.results), "", *terminal.summary(report), terminal.limits(report))
        if not before:
            return 0
        compared = _compared(choice, settings, report, before, out)
    return _verdict(compared, out)


def _check_writable(option: str, path: Path | None) -> None:
    if path is None:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(out: Console, *what: Any) -> None:
    """Prints; whoever reads may have gone (``gencore bench | head``), which is no reason to stop measuring."""
    try:
        for one in what:
            out.print(one, markup=False)
    except (BrokenPipeError, SystemExit):  # rich makes the second of the first
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _written(report: Report, json: Path | None, html: Path | None, out: Console) -> None:
    from gencore.bench import page

    try:
        if json is not None:
            report.write(json)
            _say(out, f"{json}: the report")
    finally:
        # The page is written too where the report cannot be.
        if html is not None:
            page.write(report, html)
            _say(out, f"{html}: the page")


def _run(tasks: list[suite.Task], device: str, settings: run.Settings, out: Console) -> Report:
    """Runs the tasks with a bar, and prints the table of each benchmark as soon as it is whole."""
    waiting: list[Result] = []

    def show() -> None:
        if waiting:
            _say(out, *terminal.shown(waiting, out))
        waiting.clear()

    def keep(result: Result) -> None:
        if waiting and (waiting[0].op, waiting[0].benchmark) != (result.op, result.benchmark):
            show()
        waiting.append(result)

    with _bar(len(tasks), out) as on_progress:
        try:
            return run.run(tasks, device, settings, on_progress, keep)
        finally:
            show()


@contextlib.contextmanager
def _bar(total: int, out: Console) -> Iterator[Callable[[int, str], None]]:
    """A progress bar below what ``out`` prints, where that is a terminal, else on stderr, if that is one."""
    where = out if out.is_terminal else terminal.console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=where, transient=True, disable=not where.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        yield lambda done, name: progress.update(bar, completed=done, description=name)


def _compared(
    choice: dict[str, Any], settings: run.Settings, report: Report, before: list[Report], out: Console
) -> Compared:
    """Compares, and measures again what seems to have lost: for the verdict the better measurement counts.

    The report keeps the first, so that no report has better luck with some cases than with others.
    """
    compared = compare.compare(report, *before)
    for _ in range(_AGAIN):
        doubtful = tuple(compared.lost())
        if not doubtful:
            break
        _say(out, f"{len(doubtful)} seem to have lost and are measured again")
        # In a process of its own: where its memory lies, and how its threads were placed, stays with a process.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            found = fresh.submit(_again, choice, doubtful, settings, torch.get_num_threads()).result()
        again = {result.name: result for result in found}
        results = [compare.better(result, again.get(result.name, result)) for result in report.results]
        report = dataclasses.replace(report, results=tuple(results))
        compared = compare.compare(report, *before)
    return compared


def _again(choice: dict[str, Any], names: tuple[str, ...], settings: run.Settings, threads: int) -> tuple[Result, ...]:
    """The results of those of the chosen tasks that have one of the names."""
    torch.set_num_threads(threads)
    tasks = [task for task in suite.tasks(**choice) if task.name in names]
    return run.run(tasks, choice["device"], settings).results


def _verdict(compared: Compared, out: Console) -> int:
    for warning in compared.warnings:
        _say(out, f"(other than before: {warning})")
    if not compared.changes and not compared.failed:
        raise UserError("--compare: the reports have no case and peer in common")
    lost, gained = compared.lost(), compared.gained()
    if lost or gained or compared.failed:
        _say(out, terminal.changes(compared))
    _say(
        out,
        f"{len(compared.changes)} compared with before: {len(lost)} lost more than {compare.MARGIN:.0%}, "
        f"{len(gained)} gained, {len(compared.failed)} fail that did not; {len(compared.missing)} were not run",
    )
    return 1 if lost or compared.failed else 0
