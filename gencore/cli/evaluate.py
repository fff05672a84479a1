"""``gencore evaluate``: what a trained model is worth, measured on images it has not seen."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gencore import metrics
from gencore.cli import image_sets
from gencore.cli.common import (
    BatchSize,
    DataName,
    DeviceOption,
    Loaded,
    RunFolder,
    SamplingSettings,
    Seed,
    UseEma,
    UserError,
    apart,
    beside,
    check_output,
    first_in_random_order,
    folder_or_file,
    for_json,
    load,
    load_images,
    sampling_of,
)
from gencore.cli.image_sets import FeaturesOption, WeightsOption
from gencore.data import NamedDataset
from gencore.data.conditions import conditions_for
from gencore.files import write_atomically
from gencore.metrics import FeatureExtractor
from gencore.metrics.report import LEAST_IMAGES
from gencore.models.base import Autoencodes, GenerativeModel, HasLikelihoodBound, SamplingConfig
from gencore.noise import Key
from gencore.processes import ALONE, Processes

# Folded into the key, one number per purpose, so that no two figures share noise.
_BOUND, _BOUND_K, _CLASSES, _CONDITIONAL, _FLOOR, _BOOTSTRAP = 1, 2, 3, 4, 5, 6
# Images whose features are computed between two moves of a bar.
_PIECE = 250
# Of the first column of the table.
_WIDTH = 58


def command(
    directory: RunFolder,
    data_name: DataName = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Draws per image of the second likelihood bound.")] = 50,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first test images only.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=100_000, help="Samples that are classified.")] = 1000,
    settings: SamplingSettings = None,
    features: FeaturesOption = None,
    weights: WeightsOption = None,
    seed: Seed = 0,
    batch_size: BatchSize = 250,
    out: Annotated[
        Path | None, typer.Option(metavar="JSON", parser=folder_or_file, help="[default: DIR/evaluation.json]")
    ] = None,
    ema: UseEma = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure a model: likelihood bound on test images, samples against them, reconstructions; whatever it can do."""
    of_sampling, of_data = apart(settings)
    loaded = load(directory, ema, device)
    sampling = sampling_of(loaded, of_sampling)
    path = out or loaded.directory / "evaluation.json"
    loaded.processes.by_first(lambda: check_output(path))
    test = load_images(loaded, data_name, "test", of_data)
    differ = _differing_classes(loaded, test)
    classifier = train = None
    if test.spec.num_classes > 0:
        train = load_images(loaded, data_name, "train", of_data)
        try:
            classifier = metrics.train_classifier(train, test, seed=seed)
        except ValueError as error:
            raise UserError(f"data set {test.name}: {error}") from error
    extractor = None
    if weights is not None and features in (None, "classifier"):
        raise UserError("--weights: are those of --features efficientnet or inception")
    if features not in (None, "classifier"):
        extractor = image_sets.extractor_of(features, weights, device, [], seed)
        train = train or load_images(loaded, data_name, "train", of_data)
    found = measure(
        loaded.model,
        test,
        classifier,
        Key(seed),
        num_samples,
        n,
        batch_size,
        limit,
        train,
        with_classes=not differ,
        sampling=sampling,
        processes=loaded.processes,
        progress=loaded.processes.is_first,
        extractor=extractor,
    )
    if not found:
        raise UserError(
            "nothing to measure: the model has no likelihood bound and the images have no classes; "
            "--features efficientnet measures samples by ImageNet's features"
        )
    if not loaded.processes.is_first:
        return
    run = loaded.checkpoint.run
    told = {
        "model": run.model,
        "data": run.data if data_name is None else data_name,
        "step": loaded.checkpoint.step,
        "seed": seed,
        **({} if sampling is None else {"sampling": sampling.to_dict()}),
        **found,
    }
    write_atomically(path, json.dumps(for_json(told), indent=1, allow_nan=False) + "\n")
    lines = rows(found) + ([("with classes", f"left out: {differ}")] if differ else [])
    said = [loaded.title, *(f"  {name:<{_WIDTH}}{value}" for name, value in lines), str(path)]
    print(*said, sep="\n", file=beside(path))


def _differing_classes(loaded: Loaded, test: NamedDataset) -> str:
    """Why the data's classes are not those that the model can be asked for; empty if they are, or nothing is asked."""
    run, ours, theirs = loaded.checkpoint.run, _taken_classes(loaded.model), test.spec.class_names
    if ours is None or not theirs:
        return ""
    names = loaded.spec[ours].names
    if len(theirs) != len(names):
        return f"data set {test.name} has {len(theirs)} classes, the model has {len(names)}"
    return "" if theirs == names else f"data set {test.name} has other classes than {run.data}"


def _taken_classes(model: GenerativeModel) -> str | None:
    """The condition of kind class that the model takes, if any."""
    return next((name for name in model.takes if model.spec[name].kind == "class"), None)


def measure(
    model: GenerativeModel,
    test: NamedDataset,
    classifier: metrics.Classifier | None,
    key: Key,
    num_samples: int,
    n: int,
    batch_size: int = 250,
    limit: int | None = None,
    train: NamedDataset | None = None,
    with_classes: bool = True,
    sampling: SamplingConfig | None = None,
    processes: Processes = ALONE,
    progress: bool = False,
    extractor: FeatureExtractor | None = None,
) -> dict[str, Any]:
    """Everything that can be measured of a model.

    ``bound`` and ``bound_k`` are of one draw per image and of ``num_samples``; ``classes`` are those of ``n`` samples,
    drawn without asking for any class; ``frechet`` is their distance from the test images, and that of as many of
    ``train``. A condition that the model needs is that of test images. For a model with classes, ``conditional`` is
    what is found in ``n`` samples of all classes in turns, if ``with_classes``: the images' classes must be those of
    the model. ``measures`` are the figures of the samples by the features of the classifier and of the ``extractor``,
    beside those of training images; ``reconstruction`` is of the first test images. What cannot be said of samples that
    are not finite is NaN, or left out.
    """
    found: dict[str, Any] = {}
    if isinstance(model, HasLikelihoodBound):
        conditions_for(model, test, 1, required=True)
        for name, purpose, draws in (("bound", _BOUND, 1), ("bound_k", _BOUND_K, num_samples)):
            try:
                bound = metrics.likelihood_bound(
                    model,
                    test,
                    key.fold_in(purpose),
                    num_samples=draws,
                    batch_size=batch_size,
                    limit=limit,
                    processes=processes,
                    progress=progress,
                )
            except ValueError as error:
                # The model's own refusal, such as of gray images where its likelihood is one of binary ones.
                raise UserError(f"model {model.plugin_name or type(model).__name__}: {error}") from error
            found[name] = {**asdict(bound), "bits_per_dimension": bound.bits_per_dimension}
    if isinstance(model, Autoencodes):
        found["reconstruction"] = _reconstruction(model, test, min(n, limit or n), batch_size, extractor)
    judges: list[FeatureExtractor] = [] if classifier is None else [metrics.ClassifierFeatures(classifier)]
    judges += [] if extractor is None else [extractor]
    if judges and model.can_sample:
        options: dict[str, Any] = {"n": n, "batch_size": batch_size, "sampling": sampling, "progress": progress}
        options["processes"] = processes
        needed = conditions_for(model, test, n, required=True)
        samples = metrics.draw_samples(model, key.fold_in(_CLASSES), conditions=needed, **options)
        images = test.batch(torch.arange(len(test))).images
        others = None if train is None else first_in_random_order(train, n, key.fold_in(_FLOOR)).images
        is_measurable = bool(samples.isfinite().all()) and min(n, len(images)) >= LEAST_IMAGES
        if is_measurable and processes.is_first:
            of_bootstrap = key.fold_in(_BOOTSTRAP)
            found["measures"] = [_figures(each, images, samples, others, of_bootstrap, progress) for each in judges]
        if classifier is not None:
            found |= _of_classes(classifier, samples, images, others)
            classes = _taken_classes(model)
            if classes is not None and with_classes:
                labels = torch.arange(n) % len(classifier.class_names)
                conditions = {**needed, classes: labels}
                samples = metrics.draw_samples(model, key.fold_in(_CONDITIONAL), conditions=conditions, **options)
                found["conditional"] = {
                    "accuracy": metrics.conditional_accuracy(classifier, samples, labels),
                    "confident": metrics.class_report(classifier, samples).confident,
                }
                if n > 1 and len(images) > 1:
                    reference = classifier.features(images)
                    found["conditional"]["frechet"] = _distance(classifier.features(samples), reference)
    return found


def _of_classes(
    classifier: metrics.Classifier, samples: Tensor, images: Tensor, others: Tensor | None
) -> dict[str, Any]:
    """The classes among the samples, and their distance from the test images, beside that of training images."""
    report = metrics.class_report(classifier, samples)
    found: dict[str, Any] = {
        "classes": {
            **asdict(report),
            "effective_classes": report.effective_classes,
            "test_confident": metrics.class_report(classifier, images).confident,
        }
    }
    if len(samples) > 1 and len(images) > 1:
        reference = classifier.features(images)
        found["frechet"] = {
            "measure": metrics.FRECHET_NAME,
            "distance": _distance(classifier.features(samples), reference),
            "samples": len(samples),
            "test_images": len(reference),
            "features": reference.shape[1],
        }
        if others is not None and len(others) > 1:
            distance = metrics.frechet_distance(classifier.features(others), reference)
            found["frechet"] |= {"train_distance": distance, "train_images": len(others)}
    return found


def _figures(
    extractor: FeatureExtractor, images: Tensor, samples: Tensor, others: Tensor | None, key: Key, progress: bool
) -> dict[str, Any]:
    """Every measure of the samples against the test images, beside those of training images."""

    def seen(images: Tensor, name: str) -> Tensor:
        return metrics.features_of(extractor, images.split(_PIECE), len(images), name=name, progress=progress)

    real, fake = seen(images, "test images"), seen(samples, "samples")
    other = None if others is None else seen(others, "training images")
    figures = metrics.compare(extractor, real, fake, other, key=key)
    return {
        "features": extractor.name,
        "samples": len(samples),
        "test_images": len(images),
        "train_images": None if others is None else len(others),
        "figures": [each.to_dict() for each in figures],
    }


def _reconstruction(
    model: GenerativeModel, test: NamedDataset, limit: int, batch_size: int, extractor: FeatureExtractor | None
) -> dict[str, Any]:
    try:
        found = metrics.reconstruction(model, test, limit=limit, batch_size=batch_size, extractor=extractor)
    except ValueError:
        # A model that has broken down.
        return {"images": 0, "psnr": math.nan, "ssim": None, "perceptual": None}
    values = {name: getattr(found, name) for name in ("psnr", "ssim", "perceptual")}
    return {"images": found.images, **{name: each and each.value for name, each in values.items()}}


def _distance(features: Tensor, reference: Tensor) -> float:
    """The distance, NaN if there is none: a model may have broken down."""
    return metrics.frechet_distance(features, reference) if bool(features.isfinite().all()) else math.nan


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
            (
                "samples with confidence above 0.9",
                f"{classes['confident']:.3f}  (test images: {classes['test_confident']:.3f})",
            ),
            ("its accuracy on test images", f"{classes['test_accuracy']:.3f}"),
        ]
    if "frechet" in found:
        frechet = found["frechet"]
        told = f"{frechet['distance']:.3f} for {frechet['samples']} samples"
        if "train_distance" in frechet:
            told += f"  ({frechet['train_images']} training images: {frechet['train_distance']:.3f})"
        lines.append((frechet["measure"], told))
    for told in found.get("measures", ()):
        lines += _measure_rows(told)
    if "reconstruction" in found:
        lines.append(_reconstruction_row(found["reconstruction"]))
    if "conditional" in found:
        conditional = found["conditional"]
        lines += [
            ("with classes: accuracy of the classes", f"{conditional['accuracy']:.3f}"),
            ("with classes: confidence above 0.9", f"{conditional['confident']:.3f}"),
        ]
        if "frechet" in conditional:
            lines.append(("with classes: Fréchet distance, as above", f"{conditional['frechet']:.3f}"))
    return lines


# Figures that stand in one row, with what is better.
_TOGETHER = (("frechet",), ("kernel",), ("precision", "recall"), ("density", "coverage"), ("score",))


def _measure_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures by the features of one extractor; the classifier's Fréchet distance has a row of its own."""
    figures = {each["measure"]: each for each in told["figures"]}
    lines = []
    for names in _TOGETHER:
        group = [figures[name] for name in names if name in figures]
        if not group or (names == ("frechet",) and told["features"] == "classifier"):
            continue
        values = ", ".join(f"{each['value']:.4g}" for each in group)
        low, high = group[0]["interval"]
        interval = f"  [{low:.4g} to {high:.4g}]" if len(group) == 1 and math.isfinite(low) else ""
        real = [each["real"] for each in group if each["real"] is not None]
        beside_it = f"  ({told['train_images']} training images: {', '.join(f'{x:.4g}' for x in real)})" if real else ""
        title = group[0]["name"] if len(group) == 1 else f"{', '.join(names)} ({told['features']})"
        lines.append((f"{title}, {group[0]['better']} is better", f"{values}{interval}{beside_it}"))
    return lines


def _reconstruction_row(told: dict[str, Any]) -> tuple[str, str]:
    name, value = "reconstructions: PSNR", f"{told['psnr']:.2f} dB"
    if told["ssim"] is not None:
        name, value = f"{name}, SSIM", f"{value}, {told['ssim']:.4f}"
    name += ", higher is better"
    if told["perceptual"] is not None:
        value += f"; perceptual distance {told['perceptual']:.4f}, lower is better"
    return name, f"{value}  ({told['images']} test images)"
