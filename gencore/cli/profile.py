"""``gencore profile``: where a step of a model spends its time, with PyTorch's operations and with gencore's."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from gencore.bench import profiling
from gencore.bench.machine import describe
from gencore.bench.profiling import Profile
from gencore.cli.common import (
    Device,
    DeviceOption,
    UserError,
    folder_or_file,
    model_names,
    parsed_settings,
    picture_file,
    read_images,
)
from gencore.data.conditions import conditions_for
from gencore.files import write_atomically
from gencore.train import Trainer
from gencore.train.checkpoint import read
from gencore.train.runs import make_trainer

# Of Okabe and Ito (2008), which who sees colours in another way can tell apart too; neighbours differ in lightness.
_COLOURS = dict(
    zip(
        profiling.FAMILIES,
        ("#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#F0E442", "#009E73", "#E69F00", "#4D4D4D", "#BBBBBB"),
        strict=True,
    )
)
_DARK = ("#0072B2", "#4D4D4D")
# Below it a family's gain is one of rounding.
_LEAST_SHARE = 0.005
_MANY_STEPS = 1 << 40


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Which model (see gencore list), or a run's folder.")],
    data_name: Annotated[
        str | None,
        typer.Option("--data", metavar="NAME[:PATH]", help="The images.  [default: digits, or those of the run]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the model, or train.NAME=VALUE; repeatable."),
    ] = None,
    step: Annotated[Literal["training", "sampling"], typer.Option(help="Of what.")] = "training",
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="Images of a step.  [default: 128, or that of the run]")
    ] = None,
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Of the processor.  [default: as PyTorch chooses]")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", parser=folder_or_file, help="Write the figures there.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="PNG", parser=picture_file, help="Draw them there.")
    ] = None,
) -> None:
    """Tell where a training or sampling step of MODEL spends its time, before gencore's kernels and with them."""
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        # A trainer is of a folder, in which a single step writes nothing.
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(model, data_name, settings or [], batch_size, device, Path(folder))
            found, about = _profiled(trainer, step)
        show(found, about)
        if json_file is not None:
            found.write(json_file, **about)
            print(f"{json_file}: the figures")
        if png is not None:
            write_atomically(png, picture(found, about))
            print(f"{png}: the picture")
    finally:
        torch.set_num_threads(threads_before)


def _trainer(
    model: str, data_name: str | None, settings: list[str], batch_size: int | None, device: Device, folder: Path
) -> Trainer:
    """That of the plugin of that name; if there is none, of the run in that folder, though with new weights.

    A run of several stages keeps its weights, since those of the stages before are among them.
    """
    parsed = parsed_settings(settings)
    if batch_size is not None:
        if "batch_size" in parsed.train:
            raise UserError("--batch-size and --set train.batch_size are the same setting")
        parsed.train["batch_size"] = str(batch_size)
    # The images of a run end with its last step, and a profile takes as many steps as it needs.
    parsed.train["steps"] = str(_MANY_STEPS)
    begun = None
    if model not in model_names() and Path(model).is_dir():
        begun = read(Path(model))
    name = None if begun else model
    saved = None if begun is None else begun.run
    start = begun if saved is not None and saved.parts else None
    trainer = make_trainer(name, data_name, folder, parsed, saved=saved, start=start, device=device, read=read_images)
    trainer.begin()
    return trainer


def _profiled(trainer: Trainer, step: str) -> tuple[Profile, dict[str, Any]]:
    """The profile, and what it is of."""
    n, device = trainer.config.batch_size, trainer.device.type
    parts = 1
    if step == "training":
        call: Any = profiling.training_step(trainer)
    else:
        if not trainer.model.can_sample:
            raise UserError(f"--step sampling: model {trainer.run.model} cannot sample")
        conditions = conditions_for(trainer.model, trainer.data, n, required=True)
        call, parts = profiling.sampling_step(trainer.model, n, conditions)
    found = profiling.profile(call, device=device, parts=parts)
    about = {
        "model": trainer.run.model,
        "data": trainer.run.data,
        "step": step,
        "what": "training step" if step == "training" else "sampling step" if parts > 1 else "sampling",
        "batch_size": n,
        "device": device,
        "threads": torch.get_num_threads(),
        "precision": trainer.config.precision if step == "training" else "float32",
        "config": trainer.run.config,
        "rounds": found.rounds,
    }
    return found, about


def title(about: dict[str, Any]) -> str:
    """What was profiled, and where, in one line."""
    machine = describe(about["device"])
    place = machine["name"] if about["device"] == "cuda" else f"{machine['name']}, {_counted(about['threads'])}"
    return f"{about['what']} of {about['model']} on {about['data']}, {about['batch_size']} images; {place}"


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def show(found: Profile, about: dict[str, Any]) -> None:
    """The profile as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("PyTorch ms", "%", "gencore ms", "%", "gain"):
        table.add_column(name, justify="right")
    before, after = found.before, found.after
    digits = _digits(found)
    for family in found.families:
        seconds = before.families[family], after.families[family]
        shares = seconds[0] / before.seconds, seconds[1] / after.seconds
        gain = f"{seconds[0] / seconds[1]:.2f}x" if min(shares) >= _LEAST_SHARE else ""
        figures = [f"{1e3 * time:.{digits}f}" for time in seconds]
        table.add_row(family, figures[0], f"{shares[0]:.0%}", figures[1], f"{shares[1]:.0%}", gain)
    table.add_section()
    totals = [f"{1e3 * side.seconds:.{digits}f}" for side in (before, after)]
    table.add_row("all", totals[0], "100%", totals[1], "100%", f"{found.ratio:.2f}x", style="bold")
    console = Console(highlight=False)
    console.print(title(about), style="bold", soft_wrap=True)
    console.print(table)
    console.print(verdict(found), soft_wrap=True)


def verdict(found: Profile) -> str:
    """The total and how sure it is, as a sentence."""
    low, high = found.ratio_interval
    times = f"{found.ratio:.2f} times as fast ({low:.2f} to {high:.2f}, 95%, {found.rounds} rounds)"
    if low <= 1 <= high:
        return f"with gencore {times}: no difference that is beyond the noise"
    return f"with gencore {times}"


def _digits(found: Profile) -> int:
    """Behind the point of milliseconds, for all figures of a profile."""
    longest = 1e3 * max(found.before.seconds, found.after.seconds)
    return 1 if longest >= 100 else 2 if longest >= 10 else 3


def picture(found: Profile, about: dict[str, Any]) -> bytes:
    """The profile as a PNG: a bar for PyTorch's operations and one for ours, of the families that both are made of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sides = {"PyTorch": found.before, "gencore": found.after}
    longest = max(side.seconds for side in sides.values())
    digits, lefts = _digits(found), [0.0, 0.0]
    for family in found.families:
        widths = [1e3 * side.families[family] for side in sides.values()]
        bars = axes.barh(
            list(sides), widths, left=lefts, color=_COLOURS[family], edgecolor="white", height=0.62, label=family
        )
        ink = "white" if _COLOURS[family] in _DARK else "black"
        # A label is put where there is room for it.
        told = [f"{width:.{digits}f}" if width > 0.06e3 * longest else "" for width in widths]
        axes.bar_label(bars, told, label_type="center", color=ink, fontsize=10)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for i, side in enumerate(sides.values()):
        total = f"{1e3 * side.seconds:.{digits}f} ms"
        axes.text(1e3 * (side.seconds + 0.008 * longest), i, total, va="center", fontsize=11)
    axes.set_title(f"{title(about)}\n{verdict(found)}", loc="left", fontsize=11)
    axes.set_xlabel(
        f"milliseconds of a {about['what']}" if about["what"] != "sampling" else "milliseconds", fontsize=10
    )
    axes.set_xlim(0, 1.12e3 * longest)
    axes.tick_params(labelsize=11, left=False)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=10, handlelength=1.1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
