"""How far apart are two images as a network sees them, layer by layer? For reconstructions, beside PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gencore.metrics.features import HasLayers, check_images


def perceptual_distance(extractor: HasLayers, images: Tensor, originals: Tensor) -> Tensor:
    """The distance of each image from its original in the layers of a network, 0 for equal ones::

        sum_l  mean over places of |f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)||^2

    where f_l is the vector of a layer's channels at a place. It is LPIPS without the weights of channels that were
    fitted to people's judgements, and with another network: its figures are not those of LPIPS.

    Args:
        extractor: a network with layers.
        images, originals: (N, C, H, W) in [0, 1].

    Returns:
        (N,) float32, with a gradient where the images have one.

    Raises:
        ValueError: other shapes, pixels that are not finite.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (2018), equation 1
    with w = 1.
    """
    check_images(images)
    check_images(originals)
    if images.shape != originals.shape:
        shapes = f"{tuple(originals.shape)}, got {tuple(images.shape)}"
        raise ValueError(f"images must be of the shape of originals, {shapes}")
    layers = zip(extractor.layers(images), extractor.layers(originals), strict=True)
    squares = [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2)) for x, y in layers]
    return torch.stack(squares).sum(0)
