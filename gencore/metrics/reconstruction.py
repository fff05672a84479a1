"""How much of an image does a code keep? A model's reconstructions beside the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gencore import plugins
from gencore.metrics.bootstrap import Estimate, mean_estimate
from gencore.metrics.features import FeatureExtractor, HasLayers
from gencore.metrics.perceptual import perceptual_distance
from gencore.metrics.similarity import WINDOW, psnr, ssim
from gencore.models.base import Autoencodes, GenerativeModel, checked_images
from gencore.models.modes import evaluating
from gencore.spec import Dataset


@dataclass(frozen=True)
class Reconstruction:
    """Means over ``images`` images of how like their reconstructions are.

    ``squared_error`` is the mean over pixels; ``psnr`` is in decibels; ``ssim`` is None of images below 11x11 pixels;
    ``perceptual`` is None without an extractor that has layers. PSNR and SSIM are better the higher they are, the
    others the lower.
    """

    images: int
    squared_error: Estimate
    psnr: Estimate
    ssim: Estimate | None
    perceptual: Estimate | None


@torch.no_grad()
def reconstruction(
    model: GenerativeModel,
    data: Dataset,
    *,
    limit: int | None = None,
    batch_size: int = 250,
    extractor: FeatureExtractor | None = None,
) -> Reconstruction:
    """Decodes the mean of each image's code, in evaluation mode, and compares.

    Args:
        model: one that encodes and decodes.
        data: the images.
        limit: use the first ``limit`` images only.
        batch_size: images computed at a time.
        extractor: whose layers the perceptual distance is by, if it has any.

    Raises:
        TypeError: the model has no encoder.
        ValueError: ``batch_size`` or ``limit`` below 1, or reconstructions that are not finite.
    """
    if not isinstance(model, Autoencodes):
        raise TypeError(f"model must have encode and decode, and {type(model).__name__} has not")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be at least 1, got {batch_size} and {limit}")
    count = len(data) if limit is None else min(limit, len(data))
    has_ssim = min(data.spec.image_shape[1:]) >= WINDOW
    found: dict[str, list[torch.Tensor]] = {"squared_error": [], "psnr": [], "ssim": [], "perceptual": []}
    with evaluating(model):
        for indices in torch.arange(count).split(batch_size):
            originals = data.batch(indices).images
            with plugins.blamed(model.plugin_name, "encode() or decode()"):
                decoded = model.decode(model.encode(originals.to(model.device))[0])
                images = checked_images(decoded, len(indices), model.spec).cpu()
            errors = (images - originals).double().square().flatten(1).mean(1)
            found["squared_error"].append(errors)
            found["psnr"].append(psnr(images, originals))
            if has_ssim:
                found["ssim"].append(ssim(images, originals))
            if isinstance(extractor, HasLayers):
                pieces = zip(images.split(8), originals.split(8), strict=True)
                found["perceptual"] += [perceptual_distance(extractor, x, y).cpu() for x, y in pieces]
    means = {name: mean_estimate(torch.cat(values)) if values else None for name, values in found.items()}
    assert means["squared_error"] is not None
    assert means["psnr"] is not None
    return Reconstruction(count, means["squared_error"], means["psnr"], means["ssim"], means["perceptual"])
