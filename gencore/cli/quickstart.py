"""``gencore quickstart``: everything at work in about three minutes, on data that needs no download."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional as F

from gencore import data, diffusion, metrics, ops, plugins
from gencore.bench.measure import Candidate, Timing, interleave
from gencore.cli import pictures
from gencore.cli.common import UserError, chosen_images, folder_or_file
from gencore.cli.edit import edit_picture, known_pixels
from gencore.cli.evaluate import measure
from gencore.cli.info import lines as info_lines
from gencore.cli.latents import reconstruction_picture, traversal_picture
from gencore.cli.train import run
from gencore.files import write_atomically
from gencore.info import info
from gencore.models.base import Autoencodes, Edits, HasLatents
from gencore.noise import Key
from gencore.train import TrainConfig, Trainer
from gencore.train.log import read_metrics

# What these small digits need; the models' own defaults are made for larger images.
_RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vae": ({}, {"steps": 3000, "schedule": "cosine", "ema": 0.99}),
    "gan": (
        {
            "dropout": 0.0,
            "gradient_penalty": 0.05,
            "generator_optimizer": {"lr": 5e-4},
            "discriminator_optimizer": {"lr": 1e-3},
        },
        {"steps": 4000, "ema": 0.995},
    ),
    "ddpm": (
        {
            "channels": [16, 32],
            "parameterization": "v",
            "schedule": "cosine",
            "conditional": True,
            "label_dropout": 0.2,
            "optimizer": {"lr": 2e-3},
            "sampling": {"sampler": "ddim", "steps": 25, "resamples": 5},
        },
        {"steps": 1000, "batch_size": 64, "schedule": "cosine", "warmup": 50, "ema": 0.99},
    ),
}


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", parser=folder_or_file, help="Where runs and pictures go.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Train a VAE, a GAN and a diffusion model on scikit-learn's digits, draw pictures, and time kernels."""
    started = time.monotonic()
    _claim(out)
    print("\n".join(info_lines(info())), end="\n\n", flush=True)
    train, test = data.load("digits", "train"), data.load("digits", "test")
    paths: list[Path] = []
    results: dict[str, dict[str, Any]] = {}
    # Networks this small gain little from a second thread, and wait long for it when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    classifier = metrics.train_classifier(train, test)
    curves = {}
    for name in _RECIPES:
        trainer = _trained(name, train, out / name)
        model = trainer.model
        curves[name.upper()] = read_metrics(out / name / "metrics.jsonl")
        paths.append(out / name / "samples.png")
        labels = torch.arange(80) % train.num_classes if model.conditional else None
        samples = metrics.draw_samples(model, Key(0), n=80, labels=labels)
        pictures.save(pictures.grid(samples, columns=10), paths[-1])
        if isinstance(model, Autoencodes):
            paths.append(out / name / "reconstructions.png")
            pictures.save(reconstruction_picture(model, test, 16, seed=0), paths[-1])
        if isinstance(model, HasLatents):
            paths.append(out / name / "traversal.png")
            images = test if isinstance(model, Autoencodes) else None
            pictures.save(traversal_picture(model, images, 8, 11, seed=0), paths[-1])
        if isinstance(model, Edits):
            paths.append(out / name / "edits.png")
            known = known_pixels("bottom", test.image_shape)
            pictures.save(edit_picture(model, chosen_images(test, 10, seed=0), known, 3, Key(0)), paths[-1])
        results[name] = measure(model, test, classifier, Key(0), num_samples=50, n=1000, train=train)
        results[name]["seconds"] = trainer.seconds
    paths.append(out / "losses.png")
    pictures.save(pictures.loss_curves(curves), paths[-1])
    _print_models(results)
    torch.set_num_threads(threads)
    _print_timings(_timings())
    _print_load()
    print("\npictures:")
    for path in paths:
        print(f"  {path}")
    print(f"\n{time.monotonic() - started:.0f} s in all; next: gencore sample {out / 'vae'} -n 100 --out samples.png")


def _claim(out: Path) -> None:
    """Removes what an earlier quickstart left in its folder, and nothing else."""
    marker = out / "quickstart.json"
    for name in _RECIPES:
        if (out / name).exists():
            if not marker.exists():
                raise UserError(f"{out / name} is there and no quickstart made it; choose another folder with --out")
            shutil.rmtree(out / name)
    write_atomically(marker, json.dumps({"gencore": info()["gencore"], "models": list(_RECIPES)}) + "\n")


def _trained(name: str, images: data.ImageDataset, out: Path) -> Trainer:
    """A run of the recipe, anew; its model is in evaluation mode, with the averaged weights."""
    model_settings, train_settings = _RECIPES[name]
    plugin = plugins.load_model(name)
    shape = {"image_shape": images.image_shape, "num_classes": images.num_classes}
    config = TrainConfig.from_dict(train_settings)
    trainer = Trainer(
        plugin, plugin.config.from_dict({**shape, **model_settings}), images, config, out, data_name="digits"
    )
    run(trainer)
    if trainer.average is not None:
        trainer.model.load_state_dict(trainer.average.tensors)
    return trainer


def _timings() -> dict[str, tuple[Timing, Timing]]:
    """Each op in turn with what PyTorch offers."""
    shape = (64, 4, 64, 64)
    mu, logvar, grad = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    noise, key = torch.empty(shape), Key(0)
    with_grad = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    x = torch.randn(4, 320, 64, 64)
    schedule = diffusion.linear()
    images, output = torch.randn(2, 64, 3, 64, 64).unbind()
    t = torch.arange(64) * 15
    levels = torch.stack((schedule.alpha, schedule.sigma), 1).float()
    row = diffusion.ddpm(schedule, clip=1.0).rows[500]

    def noised() -> torch.Tensor:
        alpha, sigma = levels[t].reshape(-1, 2, 1, 1, 1).unbind(1)
        return alpha * images + sigma * torch.randn_like(images)

    column = dict(zip(ops.STEP_COLUMNS, row.tolist(), strict=True))

    def stepped() -> torch.Tensor:
        x0 = (column["predict_x"] * images + column["predict_output"] * output).clamp(-1, 1)
        return column["x"] * images + column["x0"] * x0 + column["noise"] * torch.randn_like(images)

    def sample(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        return mu + torch.exp(logvar / 2) * torch.randn_like(mu)

    pairs: dict[str, tuple[Candidate, Candidate]] = {
        "normal, (64,4,64,64)": (
            lambda: ops.normal(shape, key, out=noise),
            lambda: torch.randn(shape, out=noise),
        ),
        "reparameterize": (lambda: ops.reparameterize(mu, logvar, key), lambda: sample(mu, logvar)),
        "reparameterize and backward": (
            lambda: torch.autograd.grad(ops.reparameterize(*with_grad, key), with_grad, grad),
            lambda: torch.autograd.grad(sample(*with_grad), with_grad, grad),
        ),
        "group_norm, SiLU, (4,320,64,64)": (
            lambda: ops.group_norm(x, 32, activation="silu"),
            lambda: F.silu(F.group_norm(x, 32)),
        ),
        "add_noise, (64,3,64,64)": (lambda: ops.add_noise(images, t, schedule, key), noised),
        "diffusion_step, DDPM": (lambda: ops.diffusion_step(images, output, row, key), stepped),
    }
    timings = {what: interleave({"ours": ours, "torch": theirs}) for what, (ours, theirs) in pairs.items()}
    return {what: (timing["ours"], timing["torch"]) for what, timing in timings.items()}


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


def _print_timings(timings: dict[str, tuple[Timing, Timing]]) -> None:
    print(f"\n{'float32':<34}{'gencore':>12}{'PyTorch':>12}{'ratio':>8}")
    for what, (ours, theirs) in timings.items():
        ratio = ours.ratio_of(theirs)
        print(f"{what:<34}{1e3 * ours.median:>9.2f} ms{1e3 * theirs.median:>9.2f} ms{ratio:>7.1f}x")
