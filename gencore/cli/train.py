"""``gencore train``: a run from its first step, or from its newest checkpoint."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gencore import data, plugins
from gencore.cli.common import (
    DEFAULT_DATA,
    DeviceName,
    DeviceOption,
    Settings,
    UserError,
    check_output,
    collect,
    data_settings,
    folder_or_file,
    model_names,
    parsed_settings,
    read_images,
    say,
)
from gencore.config import ConfigError
from gencore.text import counted
from gencore.train import TrainConfig, Trainer
from gencore.train.checkpoint import Checkpoint, Run, checkpoints, read, read_run
from gencore.train.interruption import exit_code
from gencore.train.log import read_metrics


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
    precision: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Of the networks.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights.")] = None,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")] = False,
) -> None:
    """Train MODEL; killed at any moment, it goes on with --resume (and needs no other option than --out then)."""
    if steps is not None and epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    options = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "seed": seed, "precision": precision, "ema": ema,
    }  # fmt: skip
    parsed = parsed_settings(settings or [])
    for name, value in options.items():
        if value is not None:
            if name in parsed.train:
                raise UserError(f"--{name.replace('_', '-')} and --set train.{name} are the same setting")
            parsed.train[name] = str(value)
    if start is not None and resume:
        raise UserError("--from begins a new run, --resume goes on with one; give one of them")
    check_output(out / "run.json")
    # Killed before it wrote what it is, a run begins anew.
    there = (out / "run.json").exists()
    if resume and model is None and not there:
        raise UserError(f"{out} holds no run (there is no run.json); to begin one, name its MODEL, without --resume")
    saved = read_run(out) if resume and there else None
    begun = None if start is None else read(start)
    trainer = trainer_of(saved, model, data_name, parsed, out, device, begun, check_splits=True)
    run(trainer, resume)


def run(trainer: Trainer, resume: bool = False) -> None:
    """Trains, saying at the start what and at the end with which result; interrupted, how to go on."""
    spec, begun = trainer.run, False

    def begin() -> None:
        nonlocal begun
        begun = True
        size = sum(parameter.numel() for parameter in trainer.model.parameters())
        print(
            f"training {spec.model} ({size:,} parameters) on {spec.data}, {counted(spec.images, 'image')}, "
            f"for {counted(trainer.total_steps, 'step')} on {trainer.device.type}",
            flush=True,
        )

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
            print(f"gencore: interrupted at step {trainer.step}, {kept}; {how}", file=sys.stderr)
        raise typer.Exit(exit_code(error)) from None
    if not begun:
        print(f"{trainer.out}: already at step {trainer.step:,}")
        return
    records = read_metrics(trainer.out / "metrics.jsonl")
    losses = {k: v for k, v in records[-1].items() if k.endswith("/loss") and v is not None} if records else {}
    told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    print(f"{trainer.out}: step {trainer.step:,} after {trainer.seconds:.0f} s; {told}")


def _saved_step(out: Path) -> int:
    saved = checkpoints(out)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def trainer_of(
    saved: Run | None,
    model: str | None,
    data_name: str | None,
    settings: Settings,
    out: Path,
    device: DeviceName,
    start: Checkpoint | None = None,
    *,
    check_splits: bool = False,
) -> Trainer:
    """The trainer of a run that was ``saved``, with the settings that are named changed, or of a new one.

    A new one is of the ``model`` of that name; with ``start``, of the model of that checkpoint, with its settings but
    for those of the trainer. With ``check_splits``, the other splits of the data set are read too, and compared.
    """
    former = saved or (start.run if start else None)
    if model is None:
        if former is None:
            raise UserError(f"give the model to train, one of {', '.join(model_names())}")
        model = former.model
    if start is not None and start.run.model != model:
        raise UserError(f"--from: {start.directory} holds model {start.run.model}, but MODEL is {model}")
    plugin = plugins.load_model(model)
    name = data.absolute_spec(data_name) if data_name is not None else former.data if former else DEFAULT_DATA
    known = [*plugin.config.offered(), *(f"train.{key}" for key in TrainConfig.offered())]
    if (kind := data.settings_type(name)) is not None:
        known += [f"data.{key}" for key in kind.offered()]
    of_trainer, trainer_faults = settings.train, list[str]()
    if saved and "epochs" in of_trainer and "steps" not in of_trainer:
        of_trainer = {**of_trainer, "steps": "none"}
    train_config = collect(TrainConfig, of_trainer, saved.train if saved else {}, "train.", trainer_faults, known)
    of_data = data_settings(former, name, settings.data, trainer_faults)
    images = read_images(name, "train", of_data)
    if check_splits:
        # A damaged file is to be found now, and not when the model is trained and measured.
        with data.showing_progress():
            say(data.check(images, name, of_data))
    shape: dict[str, Any] = {"image_shape": list(images.image_shape), "num_classes": images.num_classes}
    faults = [f"{key}: comes from the data set and cannot be set" for key in shape if key in settings.model]
    # A resumed run keeps its settings; the trainer refuses those asked for anew that are not the run's.
    base = {**(former.config if former and former.model == model else {}), **shape}
    of_model = {key: value for key, value in settings.model.items() if key not in shape}
    config = collect(plugin.config, of_model, base, "", faults, known)
    faults += trainer_faults
    if faults:
        raise ConfigError(plugin.name, faults)
    return Trainer(
        plugin, config, images, train_config, out, data_name=name, data_settings=of_data, start=start, device=device
    )
