"""Checkpoints: safetensors and JSON, never pickle; each a folder that is whole or not there.

::

    RUN/run.json                          what the run trains, on what, how (written once, at the start)
    RUN/metrics.jsonl
    RUN/checkpoints/step-00001000/
        model.safetensors                 the weights and buffers, those of frozen parts among them
        ema.safetensors                   the moving average of what is trained, if the run keeps one
        optimizer.safetensors             "<optimiser>/<parameter>/<state>", an optimiser called like its first phase
        checkpoint.json                   format, run, step, small state, and size and SHA-256 of the other files

A checkpoint is written to a folder with a temporary name, synced and renamed; only then are older ones removed. So
whatever happens at whatever moment, the newest folder named ``step-*`` is a whole checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gencore.config import ConfigError
from gencore.files import sync_directory, write_atomically, write_synced
from gencore.models.base import GenerativeModel, parts_of
from gencore.plugins import MODELS, blamed, build_model
from gencore.spec import DataSpec
from gencore.text import listed

FORMAT = 3
# Settings of data sets that say how files are read and not what is trained on.
_READING = ("cache", "skip_bad")
_STEP_FOLDER = re.compile(r"step-(\d+)")


class CheckpointError(ValueError):
    """A run or checkpoint is missing, damaged, of another model, or from a newer gencore; says which and what."""


@dataclass(frozen=True)
class Run:
    """What a run is: enough to build its model and to go on with it. Kept in ``run.json`` and in every checkpoint.

    Attributes:
        model: the name of the plugin.
        config: the model's configuration.
        spec: what its data set gives, as :meth:`gencore.spec.DataSpec.to_dict` has it.
        data: where the training images were last read, as :func:`gencore.data.load` takes it. They may move.
        data_settings: the settings of the data set.
        images: how many there are.
        fingerprint: of their content, :attr:`gencore.data.NamedDataset.fingerprint`.
        train: the trainer's configuration.
        start: the checkpoint whose weights the run began with; None for new weights.
        parts: the models that the model has adopted: name -> model, config, spec and parts of each.
    """

    model: str
    config: dict[str, Any]
    spec: dict[str, Any]
    data: str
    data_settings: dict[str, Any]
    images: int
    fingerprint: str
    train: dict[str, Any]
    start: str | None = None
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def differences(self, other: Run, allowed: tuple[str, ...] = ()) -> list[str]:
        """One line for each setting that differs, those of ``train`` that ``allowed`` names aside.

        Images are known by their content, not by the place where they lie.
        """
        ours, theirs = asdict(self), asdict(other)
        faults = []
        if self.fingerprint != other.fingerprint:
            if self.images != other.images:
                faults.append(f"images: the run has {self.images}, data set {other.data} has {other.images}")
            faults += _other_spec(self.spec, other.spec, other.data)
            faults = faults or [f"data: the images of {other.data} differ from those that the run was trained on"]
        pairs = [("model", self.model, other.model)]
        if self.model == other.model:
            names = sorted(ours["config"].keys() | theirs["config"].keys())
            pairs += [(name, ours["config"].get(name), theirs["config"].get(name)) for name in names]
        if self.data.partition(":")[0] == other.data.partition(":")[0]:
            names = sorted((ours["data_settings"].keys() | theirs["data_settings"].keys()) - set(_READING))
            pairs += [(f"data.{n}", ours["data_settings"].get(n), theirs["data_settings"].get(n)) for n in names]
        names = sorted((ours["train"].keys() | theirs["train"].keys()) - set(allowed))
        pairs += [(f"train.{name}", ours["train"].get(name), theirs["train"].get(name)) for name in names]
        return faults + [f"{name}: the run has {a!r}, asked for is {b!r}" for name, a, b in pairs if a != b]


def _other_spec(ours: Mapping[str, Any], theirs: Mapping[str, Any], data: str) -> list[str]:
    """How the data set ``data`` differs from that of a run in what it gives."""
    if ours["image_shape"] != theirs["image_shape"]:
        return [f"image_shape: the run has {ours['image_shape']}, data set {data} has {theirs['image_shape']}"]
    before, after = ({each["name"]: each for each in spec["conditions"]} for spec in (ours, theirs))
    faults = []
    for name in before.keys() | after.keys():
        if name not in after or name not in before:
            faults.append(f"conditions: data set {data} {'lacks' if name in before else 'has'} {name!r}")
        elif before[name]["names"] != after[name]["names"]:
            faults.append(f"classes: data set {data} {_other_names(before[name]['names'], after[name]['names'])}")
        elif before[name] != after[name]:
            faults.append(f"conditions: {name!r} of data set {data} is of another kind or shape")
    return sorted(faults)


def _other_names(ours: list[str], theirs: list[str]) -> str:
    lost, new = ([name for name in a if name not in b] for a, b in ((ours, set(theirs)), (theirs, set(ours))))
    first = listed(map(repr, lost or new), most=1)
    return f"lacks {first}" if lost else f"has {first} too" if new else "has another order"


def write_run(directory: Path, run: Run) -> None:
    """Writes ``run.json``, whole or not at all."""
    write_atomically(directory / "run.json", _json({"format": FORMAT, "run": asdict(run)}))


def read_run(directory: Path) -> Run:
    """The run in ``directory``.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer gencore wrote it.
    """
    path = directory / "run.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no run (there is no run.json)")
    return _run(path, _read_json(path))


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, its JSON read and checked; tensors are read, and checked too, when asked for."""

    directory: Path
    run: Run
    step: int
    state: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def has_ema(self) -> bool:
        """Whether the run keeps a moving average of the weights."""
        return "ema.safetensors" in self.files

    def weights(self, ema: bool | None = None) -> dict[str, Tensor]:
        """The model's weights and buffers: their moving average (``ema``), or if None, that if the run keeps one.

        What has no average, as the weights of frozen parts, is there as it is.

        Raises:
            CheckpointError: there is no moving average, or as :meth:`tensors`.
        """
        if ema and not self.has_ema:
            raise CheckpointError(f"{self.directory} holds no moving average (it was trained without train.average)")
        weights = self.tensors("model")
        if self.has_ema if ema is None else ema:
            weights |= self.tensors("ema")
        return weights

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors``, on the CPU.

        Raises:
            CheckpointError: the file is missing, or its bytes are not those that were written.
        """
        path = self.directory / f"{name}.safetensors"
        entry = self.files.get(path.name)
        if entry is None or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        data = path.read_bytes()
        if len(data) != entry["bytes"]:
            raise CheckpointError(f"{path} is damaged: {len(data)} bytes, {entry['bytes']} were written")
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in checkpoint.json")
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def save(
    run_directory: Path,
    run: Run,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Any,
    keep: int,
    *,
    is_best: bool = False,
) -> Path:
    """Writes the checkpoint of ``step`` atomically, then removes all but the newest ``keep``; returns its folder.

    Args:
        tensors: for each file's stem, its tensors by name.
        state: what else is needed to go on, as JSON can hold it.
        is_best: whether the link ``checkpoints/best`` is to lead to it; the one that it leads to is kept.

    Raises:
        OSError: the disk is full or refuses; the checkpoints that were there are still there, unharmed.
    """
    parent = run_directory / "checkpoints"
    final = parent / f"step-{step:08d}"
    temporary = parent / f".{final.name}.tmp"
    remove_leftovers(run_directory)
    temporary.mkdir(parents=True)
    try:
        files = {}
        for stem, named in tensors.items():
            data = safetensors.torch.save(_plain_tensors(named))
            files[f"{stem}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            write_synced(temporary / f"{stem}.safetensors", data)
        content = {"run": asdict(run), "step": step, "state": state, "files": files}
        header = {"format": FORMAT, "sha256": _digest(content), **content}
        write_synced(temporary / "checkpoint.json", _json(header).encode())
        sync_directory(temporary)
        temporary.rename(final)
        sync_directory(parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if is_best:
        mark_best(final)
    best = best_step(run_directory)
    for old in checkpoints(run_directory)[:-keep]:
        if _step_of(old) == best:
            continue
        # Renamed first: a crash while it is being removed leaves no folder that looks like a checkpoint.
        shutil.rmtree(old.rename(parent / f".{old.name}.old"), ignore_errors=True)
    return final


def mark_best(directory: Path) -> None:
    """Lets the link ``checkpoints/best`` of its run lead to the checkpoint in ``directory``."""
    link = directory.parent / ".best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    link.replace(directory.parent / "best")
    sync_directory(directory.parent)


def best_step(run_directory: Path) -> int | None:
    """The step of the checkpoint that is marked as the best one, or None."""
    link = run_directory / "checkpoints" / "best"
    return _step_of(Path(os.readlink(link))) if link.is_symlink() else None


def checkpoints(run_directory: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    parent = run_directory / "checkpoints"
    if not parent.is_dir():
        return []
    found = [(step, path) for path in parent.iterdir() if (step := _step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def _step_of(directory: Path) -> int | None:
    """The step that a checkpoint's folder is called by; None for another folder."""
    found = _STEP_FOLDER.fullmatch(directory.name)
    return int(found[1]) if found else None


def remove_leftovers(run_directory: Path) -> None:
    """Removes what killed processes left half written or half removed; for the one who holds the run's lock."""
    for name in ("run.json", "metrics.jsonl"):
        for path in run_directory.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)
    for path in (run_directory / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    (run_directory / "checkpoints" / ".best.tmp").unlink(missing_ok=True)


def read(directory: Path) -> Checkpoint:
    """The newest checkpoint of a run, or the checkpoint in ``directory`` itself.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer gencore wrote it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"there is no folder {directory}")
    # A run may be called step-1 too.
    named = _STEP_FOLDER.fullmatch(directory.name) and not (directory / "run.json").exists()
    if not named and not (directory / "checkpoint.json").exists():
        found = checkpoints(directory)
        if not found and (directory / "run.json").exists():
            raise CheckpointError(f"the run in {directory} has no checkpoint yet")
        if not found:
            raise CheckpointError(f"{directory} holds no run (there is no run.json)")
        directory = found[-1]
    path = directory / "checkpoint.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    content = _read_json(path)
    run = _run(path, content)
    digest = content.pop("sha256", None)
    del content["format"]
    if digest != _digest(content):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of its content")
    if not all(isinstance(content.get(name), kind) for name, kind in (("step", int), ("state", dict), ("files", dict))):
        raise CheckpointError(f"{path} is damaged: it does not describe a checkpoint")
    return Checkpoint(directory, run, content["step"], content["state"], content["files"])


def load_model(directory: Path | str, *, ema: bool | None = None, device: str = "cpu") -> GenerativeModel:
    """The trained model of a run (its newest checkpoint) or of one checkpoint's folder, in evaluation mode.

    Args:
        directory: a run's folder, or one of its ``checkpoints/step-*``.
        ema: whether to take the moving average of the weights; None takes it if the run keeps one.
        device: where the model goes.

    Raises:
        CheckpointError: nothing there, damaged files, no moving average, or weights that do not fit the model.
        PluginError: the model's plugin is not installed or is broken.
    """
    return restore_model(read(Path(directory)), ema=ema, device=device)


def restore_model(checkpoint: Checkpoint, *, ema: bool | None = None, device: str = "cpu") -> GenerativeModel:
    """:func:`load_model` for a checkpoint that has been read."""
    run, directory = checkpoint.run, checkpoint.directory
    with torch.random.fork_rng(devices=[]):
        model = _built(run.model, run.config, run.spec, run.parts, directory)
    fill_model(model, checkpoint.weights(ema), directory)
    return model.to(device).eval()


def adopt_parts(model: GenerativeModel, parts: Mapping[str, Any], directory: Path) -> None:
    """Gives a model the parts that its run names, without their weights."""
    for name, part in parts.items():
        built = _built(part["model"], part["config"], part["spec"], part["parts"], directory)
        with blamed(model.plugin_name, f"adopt({name!r})"):
            model.adopt(name, built)


def _built(
    name: str, config: Mapping[str, Any], spec: Mapping[str, Any], parts: Mapping[str, Any], directory: Path
) -> GenerativeModel:
    plugin = MODELS.load(name)
    try:
        model = build_model(plugin, plugin.config.from_dict(config), DataSpec.from_dict(spec))
    except ConfigError as error:
        faults = "; ".join(error.faults)
        raise CheckpointError(f"{directory} is of another version of {plugin.name}: {faults}") from error
    adopt_parts(model, parts, directory)
    return model


def described_parts(model: GenerativeModel) -> dict[str, Any]:
    """The parts of a model, as :attr:`Run.parts` has them."""
    return {
        name: {
            "model": part.plugin_name,
            "config": part.config.to_dict(),
            "spec": part.spec.to_dict(),
            "parts": described_parts(part),
        }
        for name, part in parts_of(model).items()
    }


def fill_model(model: GenerativeModel, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Copies ``weights`` into ``model``.

    Raises:
        CheckpointError: names or shapes differ (the first of each kind is named), or a weight is not finite.
    """
    check_fit(model.state_dict(), weights, directory)
    if (name := not_finite(model, weights)) is not None:
        raise CheckpointError(f"the weights in {directory} are of no use: {name} is not finite")
    model.load_state_dict(weights)


def not_finite(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """The first of ``weights`` of no use to ``model``: a parameter with a NaN or an infinity, a buffer with a NaN.

    A buffer may hold an infinity, such as one that is added to logits as a mask.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            bad = ~tensor.isfinite() if name in parameters else tensor.isnan()
            if bool(bad.any()):
                return name
    return None


def check_fit(own: Mapping[str, Tensor], found: Mapping[str, Tensor], directory: Path) -> None:
    """Raises CheckpointError unless ``found`` has the names and shapes of ``own``."""
    faults = [f"without {name}" for name in own if name not in found][:1]
    faults += [f"with {name}, which the model lacks" for name in found if name not in own][:1]
    faults += [
        f"{name} of shape {tuple(found[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in found and found[name].shape != tensor.shape
    ][:1]
    if faults:
        raise CheckpointError(f"the weights in {directory} do not fit the model: {'; '.join(faults)}")


def _plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU where needed; tied weights become one copy per name, as safetensors demands."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        pointer = copy.untyped_storage().data_ptr()
        if pointer in seen or copy.untyped_storage().nbytes() != copy.nbytes:
            copy = copy.clone()
        seen.add(pointer)
        plain[name] = copy
    return plain


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CheckpointError(f"{path} is damaged: it names no format")
    if content["format"] > FORMAT:
        newer = f"it has format {content['format']}, this gencore reads {FORMAT}"
        raise CheckpointError(f"{path} was written by a newer gencore: {newer}")
    if content["format"] < FORMAT:
        older = f"it has format {content['format']}, this gencore reads {FORMAT}"
        raise CheckpointError(f"{path} was written by an older gencore: {older}; train anew")
    return content


def _run(path: Path, content: Mapping[str, Any]) -> Run:
    values = content.get("run")
    types: dict[str, Any] = {
        "model": str, "config": dict, "spec": dict, "data": str, "data_settings": dict, "images": int,
        "fingerprint": str, "train": dict, "start": (str, type(None)), "parts": dict,
    }  # fmt: skip
    if (
        not isinstance(values, dict)
        or values.keys() != types.keys()
        or not all(isinstance(values[name], kind) for name, kind in types.items())
    ):
        raise CheckpointError(f"{path} is damaged: it does not describe a run")
    return Run(**values)
