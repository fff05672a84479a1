"""The application: its commands, and what becomes of errors."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer

from gencore.bench.cases import CasesError
from gencore.bench.results import ReportError
from gencore.cli import (
    arithmetic,
    bench,
    codes,
    compare,
    curve,
    data,
    edit,
    evaluate,
    info,
    latents,
    list_plugins,
    measure,
    neighbours,
    profile,
    project,
    quickstart,
    runs,
    sample,
    train,
)
from gencore.cli.common import UserError, begin, one_line
from gencore.config import ConfigError
from gencore.data import DataError
from gencore.metrics import MissingWeightsError
from gencore.pictures import NotFiniteError
from gencore.plugins import PluginError
from gencore.processes import OtherProcessError, is_joined, leave, started
from gencore.train import CheckpointError, NotEnoughMemoryError, TrainingError
from gencore.train.interruption import exit_code, raised_signals
from gencore.train.memory import enough_memory

# No rich panels: an error is one line, in a terminal and in a log.
app = typer.Typer(
    name="gencore",
    help="Train, sample and measure image generators.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# The commands that processes share, where torchrun starts several; others are the first one's alone.
_SHARED = ("train", "sample", "evaluate")
# Whether a fault is shown with the calls that led to it; set anew by every run.
_traceback = False


def _rank() -> int:
    try:
        return started()[0]
    except ValueError as error:
        raise UserError(str(error)) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gencore {metadata.version('gencore')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the Python traceback of an error too, such as one of a plugin's.")
    ] = False,
) -> None:
    global _traceback
    _traceback = show_traceback
    rank = _rank()
    if context.invoked_subcommand not in _SHARED:
        if rank > 0:
            raise typer.Exit
        # Nobody is there to be waited for.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    if rank > 0:
        # What is told to a person is told once.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


app.command("quickstart")(quickstart.command)
app.command("train")(train.command)
app.command("sample")(sample.command)
app.command("evaluate")(evaluate.command)
app.command("measure")(measure.command)
app.command("neighbours")(neighbours.command)
app.command("compare")(compare.command)
app.command("reconstruct")(latents.reconstruct)
app.command("interpolate")(latents.interpolate)
app.command("traverse")(latents.traverse)
app.command("arithmetic")(arithmetic.command)
app.command("project")(project.command)
app.command("curve")(curve.command)
app.command("map")(codes.latent_map)
app.command("probe")(codes.probe)
app.command("edit")(edit.command)
app.command("profile")(profile.command)
app.command("bench")(bench.command)
app.command("runs")(runs.command)
app.command("data")(data.command)
app.command("list")(list_plugins.command)
app.command("info")(info.command)

# Whose message is the line that is shown.
_TOLD = (
    UserError,
    CasesError,
    ReportError,
    PluginError,
    DataError,
    CheckpointError,
    MissingWeightsError,
    TrainingError,
    NotEnoughMemoryError,
    NotFiniteError,
    OtherProcessError,
)
# What every mistake on the command line itself derives from, whichever click typer is built on.
_UsageError: Any = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; every fault that is the user's or the system's becomes a line on stderr and exit code 2."""
    global _traceback
    _traceback = False
    begin()
    out = sys.stdout
    try:
        with raised_signals() as raised, enough_memory("this command"):
            code = app(args=None if arguments is None else list(arguments), prog_name="gencore", standalone_mode=False)
            if (number := raised()) is not None:
                # Typer says 130 of every interruption.
                code = 128 + number
    except KeyboardInterrupt as interrupt:
        code = exit_code(interrupt)
    except typer.Abort:
        code = 130
    except BrokenPipeError:
        # Whoever read the output has gone (``gencore list | head -1``); nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        return _refuse(*error.faults)
    except _TOLD as error:
        return _refuse(str(error))
    except FloatingPointError as error:
        # A model that was asked to look (``check_finite``) says at which step.
        return _refuse(str(error) or type(error).__name__)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{place}{error.strerror or error}")
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error, file=sys.stderr)
            return 2
        return _refuse(error.format_message())
    finally:
        sys.stdout = out
        leave()
    return code if isinstance(code, int) else 0


def _refuse(*faults: str) -> int:
    if _traceback:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    # What is wrong before the processes meet is wrong in all of them.
    if rank != "0" and not is_joined():
        return 2
    name = "gencore" if rank == "0" else f"gencore, process {rank}"
    for fault in faults:
        # One fault is one line, whatever a file name or a foreign message brings along.
        print(f"{name}: {one_line(fault)}", file=sys.stderr)
    return 2
