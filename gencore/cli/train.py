"""``gencore train``: a run from its first step, or from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gencore import data, plugins
from gencore.cli.common import DeviceName, DeviceOption, UserError, absolute_data_name, folder_or_file, parsed_settings
from gencore.config import Config, ConfigError
from gencore.train import TrainConfig, Trainer
from gencore.train.checkpoint import Run, checkpoints, read_run
from gencore.train.log import read_metrics


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Which model (see gencore list).")] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", parser=folder_or_file, help="The run's folder, made if it is not there.")
    ] = ...,  # type: ignore[assignment]
    data_name: Annotated[
        str | None, typer.Option("--data", metavar="NAME[:PATH]", help="The images to learn.  [default: digits]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the model, or train.NAME=VALUE; repeatable."),
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
    model_settings, train_settings = parsed_settings(settings or [])
    for name, value in options.items():
        if value is not None:
            if name in train_settings:
                raise UserError(f"--{name.replace('_', '-')} and --set train.{name} are the same setting")
            train_settings[name] = str(value)
    # Killed before it wrote what it is, a run begins anew.
    there = (out / "run.json").exists()
    if resume and model is None and not there:
        raise UserError(f"{out} holds no run (there is no run.json); to begin one, name its MODEL, without --resume")
    saved = read_run(out) if resume and there else None
    trainer = trainer_of(saved, model, data_name, model_settings, train_settings, out, device)
    run(trainer, resume)


def run(trainer: Trainer, resume: bool = False) -> None:
    """Trains, saying at the start what and at the end with which result; interrupted, how to go on."""
    spec = trainer.run
    if resume and _saved_step(trainer.out) >= trainer.total_steps:
        trainer.fit(resume=True)
        print(f"{trainer.out}: already at step {trainer.step:,}")
        return
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        f"training {spec.model} ({size:,} parameters) on {spec.data}, {spec.images:,} images, "
        f"for {trainer.total_steps:,} steps on {trainer.device.type}",
        flush=True,
    )
    try:
        trainer.fit(resume=resume)
    except KeyboardInterrupt:
        saved = _saved_step(trainer.out)
        kept = f"step {saved} is saved" if saved else "nothing is saved yet"
        typer.echo(
            f"gencore: interrupted at step {trainer.step}, {kept}; go on with: "
            f"gencore train --out {trainer.out} --resume",
            err=True,
        )
        raise typer.Exit(130) from None
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
    model_settings: dict[str, str],
    train_settings: dict[str, str],
    out: Path,
    device: DeviceName,
) -> Trainer:
    """Of a run that was ``saved``, with the settings that are named changed, or of the ``model`` of that name."""
    if model is None:
        if saved is None:
            names = ", ".join(entry.name for entry in plugins.list_models())
            raise UserError(f"give the model to train, one of {names}")
        model = saved.model
    plugin = plugins.load_model(model)
    name = absolute_data_name(data_name) if data_name is not None else saved.data if saved else "digits"
    images = data.load(name, split="train")
    shape: dict[str, Any] = {"image_shape": list(images.image_shape), "num_classes": images.num_classes}
    filled = [f"{key}: comes from the data set and cannot be set" for key in shape if key in model_settings]
    # A resumed run keeps its settings; the trainer refuses those asked for anew that are not the run's.
    same = saved is not None and saved.model == model
    faults = list(filled)
    base = {**(saved.config if saved and same else {}), **shape}
    config = _collect(plugin.config, {k: v for k, v in model_settings.items() if k not in shape}, base, "", faults)
    if saved and "epochs" in train_settings and "steps" not in train_settings:
        train_settings = {**train_settings, "steps": "none"}
    train_config = _collect(TrainConfig, train_settings, saved.train if saved else {}, "train.", faults)
    if faults:
        raise ConfigError(plugin.name, faults)
    return Trainer(plugin, config, images, train_config, out, data_name=name, device=device)


def _collect(config: type[Config], settings: dict[str, str], base: Any, prefix: str, faults: list[str]) -> Any:
    """The configuration; its faults go to ``faults``, so that those of model and trainer are told together."""
    try:
        return config.from_strings(settings, base)
    except ConfigError as error:
        faults += [prefix + fault for fault in error.faults]
        return None
