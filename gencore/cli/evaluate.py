"""``gencore evaluate``: what a trained model is worth, measured on images it has not seen."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gencore import metrics
from gencore.cli.common import (
    BatchSize,
    DataName,
    DeviceOption,
    RunFolder,
    Seed,
    UseEma,
    UserError,
    folder_or_file,
    load,
    load_images,
)
from gencore.data import ImageDataset
from gencore.files import write_atomically
from gencore.models.base import GenerativeModel, HasLikelihoodBound
from gencore.noise import Key

# Folded into the key, one number per purpose, so that no two figures share noise.
_BOUND, _BOUND_K, _CLASSES = 1, 2, 3


def command(
    directory: RunFolder,
    data_name: DataName = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Draws per image of the tighter likelihood bound.")] = 50,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first test images only.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Samples whose classes are counted.")] = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 250,
    out: Annotated[
        Path | None, typer.Option(metavar="JSON", parser=folder_or_file, help="[default: DIR/evaluation.json]")
    ] = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure the likelihood bound on test images and the classes of the samples, whichever can be measured."""
    loaded = load(directory, ema, device)
    test = load_images(loaded, data_name, "test")
    classifier = None
    if test.num_classes > 0:
        train = load_images(loaded, data_name, "train")
        classifier = metrics.train_classifier(train, test, seed=seed)
    found = measure(loaded.model, test, classifier, Key(seed), num_samples, n, batch_size, limit)
    if not found:
        raise UserError("nothing to measure: the model has no likelihood bound and the images have no classes")
    run = loaded.checkpoint.run
    told = {
        "model": run.model,
        "data": run.data if data_name is None else data_name,
        "step": loaded.checkpoint.step,
        "seed": seed,
        **found,
    }
    path = out or loaded.directory / "evaluation.json"
    write_atomically(path, json.dumps(_finite(told), indent=1, allow_nan=False) + "\n")
    print(loaded.title)
    for name, value in rows(found):
        print(f"  {name:<40}{value}")
    print(path)


def _finite(value: Any) -> Any:
    """``value`` with null for the numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(
    model: GenerativeModel,
    test: ImageDataset,
    classifier: metrics.Classifier | None,
    key: Key,
    num_samples: int,
    n: int,
    batch_size: int = 250,
    limit: int | None = None,
) -> dict[str, Any]:
    """Everything that can be measured of a model: ``bound``, ``bound_k`` and ``classes``."""
    found: dict[str, Any] = {}
    if isinstance(model, HasLikelihoodBound):
        for name, purpose, draws in (("bound", _BOUND, 1), ("bound_k", _BOUND_K, num_samples)):
            try:
                bound = metrics.likelihood_bound(
                    model, test, key.fold_in(purpose), num_samples=draws, batch_size=batch_size, limit=limit
                )
            except ValueError as error:
                # The model's own refusal, such as of gray images where its likelihood is one of binary ones.
                raise UserError(str(error)) from error
            found[name] = {**asdict(bound), "bits_per_dimension": bound.bits_per_dimension}
    if classifier is not None:
        report = metrics.classify_samples(model, classifier, key.fold_in(_CLASSES), n=n, batch_size=batch_size)
        found["classes"] = {**asdict(report), "effective_classes": report.effective_classes}
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What :func:`measure` found, as lines of a table."""
    lines = []
    for name in ("bound", "bound_k"):
        if name in found:
            bound = found[name]
            draws = f"{bound['num_samples']} draw" + ("s" if bound["num_samples"] > 1 else "")
            error = "" if not math.isfinite(bound["standard_error"]) else f" ± {bound['standard_error']:.2f}"
            lines.append(
                (
                    f"-log p(x), nats, at most ({draws})",
                    f"{-bound['nats']:.2f}{error}  ({bound['bits_per_dimension']:.3f} bits/dim)",
                )
            )
    if "classes" in found:
        classes = found["classes"]
        total = len(classes["class_names"])
        lines += [
            ("classes among the samples", f"{classes['present']} of {total}"),
            ("effective classes, exp(entropy)", f"{classes['effective_classes']:.2f}"),
            ("mean confidence of the classifier", f"{classes['mean_confidence']:.3f}"),
            ("its accuracy on test images", f"{classes['test_accuracy']:.3f}"),
        ]
    return lines
