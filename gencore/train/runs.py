"""From names and settings to a trained model: what the command line does, for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gencore import data as data_sets
from gencore.config import ConfigError
from gencore.data import MissingSplitError, NamedDataset, Split
from gencore.models.base import GenerativeModel, ModelPlugin
from gencore.plugins import MODELS, faults_with
from gencore.text import counted
from gencore.train import checkpoint as checkpoints
from gencore.train.checkpoint import Checkpoint, Run
from gencore.train.config import TrainConfig
from gencore.train.errors import TrainingError
from gencore.train.settings import DEFAULT_DATA, Settings, apart, collect, data_settings
from gencore.train.trainer import Device, Trainer, choose_device

# Reads a data set, by its name, its split and its settings.
Reader = Callable[[str, Split, dict[str, Any]], NamedDataset]


def train(
    model: str,
    *,
    out: Path | str,
    data: str | None = None,
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    start: Path | str | None = None,
    resume: bool = False,
    device: Device = "auto",
    progress: bool = True,
) -> GenerativeModel:
    """Trains a model on a data set into a run's folder, as ``gencore train`` does, and returns it as :func:`load` does.

    >>> model = train("vae", data="digits", out="runs/vae", steps=500, settings={"latent_size": 20})  # doctest: +SKIP

    Args:
        model: the name of a model plugin.
        out: the run's folder, made if it is not there.
        data: the name of a data set, ``name`` or ``name:path``; None: that of the run to go on with or to begin with,
            or else ``digits``.
        steps: of the training; None: as many as ``train.epochs`` says.
        settings: by the names of ``gencore train --set``: those of the model, ``train.NAME`` and ``data.NAME``.
        start: a run whose weights the new one begins with.
        resume: go on from the newest checkpoint in ``out``, if there is one, with the settings of the run.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: whether to show how far it is, on stderr.

    Raises:
        ConfigError: wrong settings; all faults are told at once.
        PluginError, DataError, CheckpointError, TrainingError: as :meth:`Trainer.fit` and :func:`gencore.data.load`.
    """
    out = Path(out)
    given = apart(settings or {})
    if steps is not None:
        given.train["steps"] = steps
    saved = checkpoints.read_run(out) if resume and (out / "run.json").exists() else None
    begun = None if start is None else checkpoints.read(Path(start))
    trainer = make_trainer(model, data, out, given, saved=saved, start=begun, device=device, progress=progress)
    trainer.fit(resume=resume)
    return load(out, device=device)


def load(directory: Path | str, *, ema: bool | None = None, device: Device = "auto") -> GenerativeModel:
    """The trained model of a run, or of one of its checkpoints, in evaluation mode.

    >>> model = load("runs/vae")                                                                # doctest: +SKIP
    >>> images = model.sample(16, Key(0))                                                       # doctest: +SKIP

    Args:
        directory: a run's folder, or one of its ``checkpoints/step-*`` or ``checkpoints/best``.
        ema: whether to take the moving average of the weights; None takes it if the run keeps one.
        device: where the model goes.

    Raises:
        CheckpointError: nothing there, damaged files, no moving average, or weights that do not fit the model.
        PluginError: the model's plugin is not installed or is broken.
    """
    return checkpoints.load_model(directory, ema=ema, device=str(choose_device(device)))


def make_trainer(
    model: str | None,
    data_name: str | None,
    out: Path,
    settings: Settings,
    *,
    saved: Run | None = None,
    start: Checkpoint | None = None,
    device: Device = "auto",
    progress: bool = True,
    read: Reader = data_sets.load,
    tell: Callable[[Iterable[str]], None] | None = None,
) -> Trainer:
    """The trainer of a run that was ``saved``, with the settings that are named changed, or of a new one.

    A new one is of the ``model`` of that name; with ``start``, of the model of that checkpoint, with its settings but
    for those of the trainer.

    Args:
        read: how to read the data set.
        tell: takes the notes of its other splits, which are read too, and compared; None: they are not.
    """
    former = saved or (start.run if start else None)
    if model is None:
        if former is None:
            raise TrainingError(f"give the model to train, one of {', '.join(MODELS.names())}")
        model = former.model
    if start is not None and start.run.model != model:
        raise TrainingError(f"{start.directory} holds model {start.run.model}, but the model to train is {model}")
    plugin = MODELS.load(model)
    name = data_sets.absolute_spec(data_name) if data_name is not None else former.data if former else DEFAULT_DATA
    known = [*plugin.config.setting_names(), *(f"train.{key}" for key in TrainConfig.setting_names())]
    if (kind := data_sets.settings_type(name)) is not None:
        known += [f"data.{key}" for key in kind.setting_names()]
    of_trainer, faults = settings.train, list[str]()
    if saved and "epochs" in of_trainer and "steps" not in of_trainer:
        of_trainer = {**of_trainer, "steps": None}
    config = collect(TrainConfig, of_trainer, saved.train if saved else _defaults(plugin), "train.", faults, known)
    # A resumed run keeps its settings; the trainer refuses those asked for anew that are not the run's.
    base = former.config if former and former.model == model else plugin.defaults
    of_model_faults: list[str] = []
    of_model = collect(plugin.config, settings.model, base, "", of_model_faults, known)
    of_data = data_settings(former, name, settings.data, [*of_model_faults, *faults])
    images = read(name, "train", of_data)
    if start is not None and (theirs := start.run.spec["image_shape"][0]) != (ours := images.spec.image_shape[0]):
        told = f"{start.directory} holds a model of images with {counted(theirs, 'channel')}"
        raise TrainingError(f"{told}, but those of {images.name} have {ours}")
    if tell is not None:
        # A damaged file is to be found now, and not when the model is trained and measured.
        with data_sets.showing_progress():
            tell(data_sets.check(images, name, of_data))
    if of_model is not None:
        of_model_faults += faults_with(plugin, of_model, images.spec)
    if faults := of_model_faults + faults:
        raise ConfigError(plugin.name, faults)
    validation = None
    if config.validate_every is not None or config.measure_every is not None:
        try:
            validation = read(name, "test", of_data)
        except MissingSplitError as error:
            if config.validate_every is not None:
                raise TrainingError(f"train.validate_every needs test images: {error}") from error
    return Trainer(
        plugin,
        of_model,
        images,
        config,
        out,
        data_name=name,
        data_settings=of_data,
        validation=validation,
        start=start,
        device=device,
        progress=progress,
    )


def _defaults(plugin: ModelPlugin) -> Mapping[str, Any]:
    """A plugin's defaults of the trainer.

    Raises:
        PluginError: they are wrong.
    """
    try:
        TrainConfig.from_dict(plugin.train)
    except ConfigError as error:
        raise MODELS.broken(plugin.name, f"its train is wrong: {'; '.join(error.faults)}") from error
    return plugin.train
