"""``gencore train``: a run from its first step, or from its newest checkpoint."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from gencore.cli.common import (
    DeviceOption,
    UserError,
    check_output,
    folder_or_file,
    model_names,
    parsed_settings,
    read_images,
    say,
)
from gencore.data.base import described
from gencore.models.base import Phase
from gencore.text import counted
from gencore.train import Trainer
from gencore.train.checkpoint import Checkpoint, checkpoints, read, read_run
from gencore.train.interruption import exit_code
from gencore.train.log import read_metrics
from gencore.train.memory import peak_memory
from gencore.train.runs import make_trainer
from gencore.train.settings import apart as split_settings
from gencore.train.settings import over, read_file


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", autocompletion=model_names, help="Which model (see gencore list).")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", parser=folder_or_file, help="The run's folder, made if it is not there.")
    ] = ...,  # type: ignore[assignment]
    data_name: Annotated[
        str | None, typer.Option("--data", metavar="NAME[:PATH]", help="The images to learn.  [default: digits]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting: NAME of the model, train.NAME, data.NAME; repeatable."
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", parser=folder_or_file, help="Begin with the weights of this run, or checkpoint."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a minibatch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Governs weights, order and noise.")] = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the networks.")
    ] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=folder_or_file,
            help="Settings in JSON or TOML, by the names of --set. Options override them.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, with one step of it; write nothing.")
    ] = False,
) -> None:
    """Train MODEL; killed at any moment, it goes on with --resume (and needs no other option than --out then)."""
    if steps is not None and epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    options = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed, "precision": precision,
        "average.decay": ema,
    }  # fmt: skip
    parsed = parsed_settings(settings or [])
    for name, value in options.items():
        if value is not None:
            if name in parsed.train:
                option = "ema" if name == "average.decay" else name.replace("_", "-")
                raise UserError(f"--{option} and --set train.{name} are the same setting")
            parsed.train[name] = str(value)
    if config is not None:
        of_file = split_settings(read_file(config))
        if "epochs" in parsed.train and "steps" not in parsed.train:
            # Else the file's steps would be those that count.
            of_file.train.pop("steps", None)
        parsed = over(of_file, parsed)
    if start is not None and resume:
        raise UserError("--from begins a new run, --resume goes on with one; give one of them")
    if not dry_run:
        check_output(out / "run.json")
    # Killed before it wrote what it is, a run begins anew.
    there = (out / "run.json").exists()
    if resume and model is None and not there:
        raise UserError(f"{out} holds no run (there is no run.json); to begin one, name its MODEL, without --resume")
    saved = read_run(out) if resume and there else None
    begun = None if start is None else read(start)
    if model is None and saved is None and begun is None:
        raise UserError(f"give the model to train, one of {', '.join(model_names())}")
    trainer = make_trainer(
        model, data_name, out, parsed, saved=saved, start=begun, device=device, read=read_images, tell=say
    )
    if dry_run:
        _tell_plan(trainer, read(out) if resume and checkpoints(out) else None)
    else:
        run(trainer, resume)


def run(trainer: Trainer, resume: bool = False) -> None:
    """Trains, saying at the start what and at the end with which result; interrupted, how to go on."""
    begun = False

    def begin() -> None:
        nonlocal begun
        begun = True
        print(f"training {_plan(trainer)}", flush=True)

    try:
        trainer.fit(resume=resume, begin=begin)
    except KeyboardInterrupt as error:
        saved = checkpoints(trainer.out)
        kept = f"step {_saved_step(trainer.out)} is saved" if saved else "nothing is saved yet"
        how = f"go on with: gencore train --out {shlex.quote(str(trainer.out))} --resume"
        if trainer.run.start and not saved:
            how = "begin it anew"
        # Whoever closed the terminal reads nothing.
        with contextlib.suppress(OSError):
            if trainer.processes.is_first:
                print(f"gencore: interrupted at step {trainer.step}, {kept}; {how}", file=sys.stderr)
        raise typer.Exit(exit_code(error)) from None
    if not trainer.processes.is_first:
        return
    if not begun:
        print(f"{trainer.out}: already at step {trainer.step:,}" if trainer.total_steps else f"{trainer.out}: done")
        return
    records = read_metrics(trainer.out / "metrics.jsonl")
    losses = {k: v for k, v in records[-1].items() if k.endswith("/loss") and v is not None} if records else {}
    told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    print(f"{trainer.out}: step {trainer.step:,} after {trainer.seconds:.0f} s; {told}")


def _plan(trainer: Trainer) -> str:
    """What is trained, on what, for how long, where."""
    spec, size = trainer.run, trainer.processes.size
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    place = trainer.device.type if size == 1 else f"{trainer.device.type}, in {size} processes"
    return (
        f"{spec.model} ({parameters:,} parameters) on {spec.data}, {counted(spec.images, 'image')}, "
        f"for {counted(trainer.total_steps, 'step')} on {place}"
    )


def _tell_plan(trainer: Trainer, saved: Checkpoint | None) -> None:
    """Trains one step by itself, from the start or from ``saved``, and says what a training would do and need."""
    before = peak_memory(trainer.device)
    trainer.begin(saved)
    lines = [_plan(trainer), f"  images    {described(trainer.data.spec)}"]
    started = time.monotonic()
    if trainer.step < trainer.total_steps:
        trainer.advance()
    seconds = time.monotonic() - started
    for runner in trainer.runners:
        phase = runner.phase
        count = sum(parameter.numel() for parameter in phase.optimizer.parameters)
        kind = type(phase.optimizer.groups[0].settings).__name__
        loss = runner.meter.means(trainer.processes).get("loss", math.nan)
        lines.append(f"  phase     {phase.name}: {count:,} parameters, {kind}, {_often(phase)}, first loss {loss:.4g}")
    lines.append(f"  memory    {(peak_memory(trainer.device) - before) / 2**20:,.0f} MiB at the peak of the first step")
    lines.append(f"  time      {seconds:.3g} s for the first step; later ones are quicker")
    lines.append("nothing was written")
    if trainer.processes.is_first:
        print("\n".join(lines))


def _often(phase: Phase) -> str:
    """``once a step``, ``twice every 16 steps``."""
    times = {1: "once", 2: "twice"}.get(phase.repeats, f"{phase.repeats} times")
    return f"{times} a step" if phase.every == 1 else f"{times} every {phase.every} steps"


def _saved_step(out: Path) -> int:
    saved = checkpoints(out)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0
