"""``gencore quickstart``: everything at work in two to three minutes, on data that needs no download."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gencore import data, metrics, pictures
from gencore.bench import run as benchmark
from gencore.bench import suite, text
from gencore.bench.results import Report
from gencore.cli.common import UserError, chosen_images, folder_or_file
from gencore.cli.edit import edit_picture, known_pixels
from gencore.cli.evaluate import measure
from gencore.cli.info import lines as info_lines
from gencore.cli.latents import reconstruction_picture, traversal_picture
from gencore.cli.train import run
from gencore.data.conditions import conditions_for
from gencore.files import write_atomically
from gencore.info import info
from gencore.models.base import Autoencodes, HasLatents
from gencore.noise import Key
from gencore.train import Trainer, load
from gencore.train.log import read_metrics
from gencore.train.runs import make_trainer
from gencore.train.settings import DEFAULT_DATA, apart

_TIMED = (
    ("normal", "forward into a given tensor"),
    ("reparameterize", "forward"),
    ("reparameterize", "forward and backward"),
    ("add_noise", "forward"),
    ("diffusion_step", "DDPM step"),
    ("group_norm", "forward"),
)
# What these small digits need; the models' own defaults are made for larger images.
_RECIPES: dict[str, dict[str, Any]] = {
    "vae": {"train": {"steps": 1500, "schedule": "cosine", "average": {"decay": 0.99}}},
    "gan": {
        "r1": 0.2,
        "generator_optimizer": {"lr": 5e-4},
        "discriminator_optimizer": {"lr": 1e-3},
        "train": {"steps": 2000, "average": {"decay": 0.995}},
    },
    "ddpm": {
        "channels": [16, 32],
        "parameterization": "v",
        "schedule": "cosine",
        "conditional": True,
        "label_dropout": 0.2,
        "optimizer": {"lr": 2e-3},
        "sampling": {"sampler": "ddim", "steps": 25, "resamples": 5},
        "train": {
            "steps": 600, "batch_size": 64, "schedule": "cosine", "warmup": 50, "average": {"decay": 0.99},
        },
    },
}  # fmt: skip


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", parser=folder_or_file, help="Where runs and pictures go.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Train a VAE, a GAN and a diffusion model on scikit-learn's digits, draw pictures, and time kernels."""
    started = time.monotonic()
    _claim(out)
    print("\n".join(info_lines(info())), end="\n\n", flush=True)
    _say("Three models are trained and measured, then kernels are timed: some two minutes on two cores.")
    train, test = data.load("digits", "train"), data.load("digits", "test")
    paths: list[Path] = []
    results: dict[str, dict[str, Any]] = {}
    # Networks this small gain little from a second thread, and wait long for it when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _say("training the classifier that judges their samples")
    classifier = metrics.train_classifier(train, test)
    curves = {}
    for name in _RECIPES:
        trainer = _trained(name, out / name)
        model = trainer.model
        _say(f"drawing samples of {name} and measuring them")
        curves[name.upper()] = read_metrics(out / name / "metrics.jsonl")
        paths.append(out / name / "samples.png")
        samples = metrics.draw_samples(model, Key(0), n=80, conditions=conditions_for(model, test, 80, in_turns=True))
        pictures.save(pictures.grid(samples, columns=10), paths[-1])
        if isinstance(model, Autoencodes):
            paths.append(out / name / "reconstructions.png")
            pictures.save(reconstruction_picture(model, test, 16, seed=0), paths[-1])
        if isinstance(model, HasLatents):
            paths.append(out / name / "traversal.png")
            images = test if isinstance(model, Autoencodes) else None
            pictures.save(traversal_picture(model, images, 8, 11, seed=0), paths[-1])
        if model.can_edit:
            paths.append(out / name / "edits.png")
            known = known_pixels("bottom", test.spec.image_shape)
            pictures.save(edit_picture(model, chosen_images(test, 10, seed=0).images, known, 3, Key(0)), paths[-1])
        results[name] = measure(model, test, classifier, Key(0), num_samples=50, n=1000, train=train)
        results[name]["seconds"] = trainer.seconds
    paths.append(out / "losses.png")
    pictures.save(pictures.loss_curves(curves), paths[-1])
    _print_models(results)
    torch.set_num_threads(threads)
    _say(f"\ntiming {len(_TIMED)} kernels beside PyTorch's")
    _print_timings(_timings())
    _print_load()
    print("\npictures:")
    for path in paths:
        print(f"  {path}")
    print(f"\n{time.monotonic() - started:.0f} s in all; next: gencore sample {out / 'vae'} -n 100 --out samples.png")


def _say(what: str) -> None:
    """Before what is silent for a while."""
    print(what, flush=True)


def _claim(out: Path) -> None:
    """Removes what an earlier quickstart left in its folder, and nothing else."""
    marker = out / "quickstart.json"
    for name in _RECIPES:
        if (out / name).exists():
            if not marker.exists():
                raise UserError(f"{out / name} is there and no quickstart made it; choose another folder with --out")
            shutil.rmtree(out / name)
    write_atomically(marker, json.dumps({"gencore": info()["gencore"], "models": list(_RECIPES)}) + "\n")


def _trained(name: str, out: Path) -> Trainer:
    """A run of the recipe, anew; its model is in evaluation mode, with the averaged weights."""
    trainer = make_trainer(name, DEFAULT_DATA, out, apart(_RECIPES[name]))
    run(trainer)
    trainer.model = load(out)
    return trainer


def _timings() -> Report:
    """Some ops in turn with what PyTorch offers."""
    tasks = suite.tasks(tuple(dict.fromkeys(op for op, _ in _TIMED)), quick=True)
    return benchmark.run(
        [task for task in tasks if (task.benchmark.op, task.benchmark.name) in _TIMED], "cpu", benchmark.QUICK
    )


def _print_models(results: dict[str, dict[str, Any]]) -> None:
    header = ("digits, 8x8", "-log p(x) at most", "with 50 draws", "classes", "confidence", "Fréchet", "seconds")
    widths = (-14, 20, 16, 12, 12, 10, 10)
    rows: list[tuple[str, ...]] = [header]
    for name, found in results.items():
        bounds = [f"{-found[key]['nats']:.2f} nats" if key in found else "-" for key in ("bound", "bound_k")]
        classes = found["classes"]
        present = f"{classes['present']} of {len(classes['class_names'])}"
        confidence, seconds = f"{classes['mean_confidence']:.2f}", f"{found['seconds']:.0f}"
        rows.append((name, *bounds, present, confidence, f"{found['frechet']['distance']:.1f}", seconds))
    print()
    for row in rows:
        print("".join(cell.ljust(-w) if w < 0 else cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
    print("(of binarized images for the vae, of 8-bit ones for the ddpm: they cannot be compared)")
    floor = next(iter(results.values()))["frechet"]["train_distance"]
    print(f"({metrics.FRECHET_NAME}; as many training images have {floor:.1f})")
    for name, found in results.items():
        if "conditional" in found:
            told = found["conditional"]
            print(
                f"({name}, asked for each class in turn: {100 * told['accuracy']:.0f}% are of it, "
                f"Fréchet distance {told['frechet']:.1f})"
            )


def _print_load() -> None:
    cores = os.cpu_count() or 1
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > cores + 0.5:
        print(f"(the machine is busy, load {load:.1f} on {cores} cores: other times will come out on a quiet one)")


def _print_timings(report: Report) -> None:
    print(f"\n{'float32; gencore bench has more':<58}{'gencore':>10}{'PyTorch':>10}{'ratio':>8}")
    for result in report.results:
        what = f"{result.op}, {result.benchmark}, {result.case}"
        eager = next(peer for peer in result.peers if peer.name == "eager")
        times = f"{text.seconds(result.ours.seconds):>10}{text.seconds(eager.seconds):>10}"
        print(f"{what:<58}{times}{text.times(eager.ratio):>7}x")
