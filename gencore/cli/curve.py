"""``gencore curve``: how the error of reconstructed images falls as the code grows, model by model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gencore import metrics, pictures
from gencore.cli.common import (
    BatchSize,
    DeviceOption,
    UserError,
    check_output,
    folder_or_file,
    parsed_settings,
    print_table,
    read_images,
    report,
    say,
)
from gencore.cli.train import run
from gencore.files import write_atomically
from gencore.models.base import Autoencodes
from gencore.plugins import MODELS
from gencore.train import load
from gencore.train.checkpoint import read_run
from gencore.train.runs import make_trainer
from gencore.train.settings import DEFAULT_DATA, Settings
from gencore.train.trainer import Device

# The setting that says how large a code is.
_SIZE = "latent_size"


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", parser=folder_or_file, help="Where runs and figures go.")],
    models: Annotated[str, typer.Option(metavar="MODEL,...", help="Models with an encoder.")] = "pca,autoencoder",
    sizes: Annotated[str, typer.Option(metavar="N,...", help="Sizes of the code.")] = "2,4,8,16,32",
    data_name: Annotated[
        str | None, typer.Option("--data", metavar="NAME[:PATH]", help="The images to learn.  [default: digits]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting of the models that have it, train.NAME or data.NAME."
        ),
    ] = None,
    batch_size: BatchSize = 250,
    device: DeviceOption = "auto",
) -> None:
    """Train each model at each size of its code, and draw the error of test images over it; goes on where it was ended.

    Each run is a folder DIR/MODEL-SIZE, a run like any other; one that is there already is taken as it is.
    """
    names = [name.strip() for name in models.split(",")]
    counts = _sizes(sizes)
    given = parsed_settings(settings or [])
    known = {name: MODELS.load(name).config.setting_names() for name in names}
    for name in names:
        if _SIZE not in known[name]:
            raise UserError(f"--models: model {name} has no setting {_SIZE}, the size of its code")
    for setting in given.model:
        if setting == _SIZE:
            raise UserError(f"--set {_SIZE}: the sizes are those of --sizes")
        if not any(setting in each for each in known.values()):
            raise UserError(f"--set {setting}: is a setting of none of the models {', '.join(names)}")
    check_output(out / "curve.json")
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for name in names:
        of_model = {key: value for key, value in given.model.items() if key in known[name]}
        for size in counts:
            chosen = Settings({**of_model, _SIZE: size}, given.train, given.data)
            found[name][size] = _measured(name, out / f"{name}-{size}", data_name, chosen, batch_size, device)
    told = {"data": data_name or DEFAULT_DATA, "models": found}
    write_atomically(out / "curve.json", json.dumps(told, indent=1) + "\n")
    path = out / "curve.png"
    errors = {name: {size: each["error"] for size, each in of_sizes.items()} for name, of_sizes in found.items()}
    pictures.save(pictures.error_curves(errors, f"test images of {told['data']}"), path)
    rows: list[tuple[str, ...]] = [("mean squared error", *(f"{size} values" for size in counts))]
    rows += [(name, *(f"{error:.5f}" for error in of_sizes.values())) for name, of_sizes in errors.items()]
    print_table(rows)
    report(path, f"errors over sizes of codes; figures in {out / 'curve.json'}")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise UserError(f"--sizes takes different numbers of at least 1 with commas between them, got {text!r}")
    return sorted(sizes)


def _measured(
    name: str, folder: Path, data_name: str | None, settings: Settings, batch_size: int, device: Device
) -> dict[str, Any]:
    """The figures of one run, which is trained first, or to its end."""
    saved = read_run(folder) if (folder / "run.json").exists() else None
    trainer = make_trainer(name, data_name, folder, settings, saved=saved, device=device, read=read_images, tell=say)
    run(trainer, resume=True)
    model = load(folder, device=device)
    if not isinstance(model, Autoencodes):
        raise UserError(f"--models: model {name} has no encoder, so that it reconstructs no images")
    test = read_images(trainer.run.data, "test", dict(trainer.run.data_settings))
    told = metrics.reconstruction(model, test, batch_size=batch_size)
    error = told.squared_error
    return {
        "error": error.value,
        "standard_error": error.standard_error,
        "psnr": told.psnr.value,
        "images": told.images,
    }
