"""How like is an image to the one it should be? PSNR and SSIM, of reconstructions, translations and fills."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# The window of SSIM: a Gaussian cut to so many pixels.
WINDOW, _SIGMA = 11, 1.5
# What keeps the fractions of SSIM finite, for pixels in [0, 1].
_C1, _C2 = 0.01**2, 0.03**2


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image in decibels, higher is better: -10 log10 of the mean squared error.

    Infinite for equal images. It compares pixel by pixel: an image moved by one pixel is as bad as a bad one, and a
    blurred one may be good.

    Args:
        images, originals: (N, C, H, W) in [0, 1].

    Returns:
        (N,) float64.

    Raises:
        ValueError: other shapes, pixels that are not finite.
    """
    images, originals = _checked(images, originals)
    return -10 * (images - originals).square().flatten(1).mean(1).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """The structural similarity of each image to its original, at most 1::

        (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))

    with the means, variances and covariance under a Gaussian window of 11 x 11 pixels (sigma 1.5), the mean over all
    places where the window lies inside the image, and over channels. C1 = 0.01^2, C2 = 0.03^2. It forgives changes of
    brightness and contrast, and knows neither colours (each channel is alone) nor what an image shows.

    Args:
        images, originals: (N, C, H, W) in [0, 1], height and width at least 11.

    Returns:
        (N,) float64.

    Raises:
        ValueError: other shapes, pixels that are not finite.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), equation 13.
    """
    images, originals = _checked(images, originals)
    if min(images.shape[2:]) < WINDOW:
        size = "x".join(map(str, images.shape[2:]))
        raise ValueError(f"images must be at least {WINDOW}x{WINDOW} pixels for SSIM, got {size}")
    x, y = _blurred(images), _blurred(originals)
    variances = _blurred(images.square()) - x.square() + _blurred(originals.square()) - y.square()
    covariance = _blurred(images * originals) - x * y
    similarity = (2 * x * y + _C1) * (2 * covariance + _C2) / ((x.square() + y.square() + _C1) * (variances + _C2))
    return similarity.flatten(1).mean(1)


def _blurred(images: Tensor) -> Tensor:
    """The means under the window, where it lies inside the image."""
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = (-places.square() / (2 * _SIGMA**2)).exp()
    window = window / window.sum()
    channels = images.shape[1]
    for shape in ((1, 1, WINDOW, 1), (1, 1, 1, WINDOW)):
        images = F.conv2d(images, window.reshape(shape).expand(channels, *shape[1:]), groups=channels)
    return images


def _checked(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    for name, given in (("images", images), ("originals", originals)):
        if given.dim() != 4 or given.numel() == 0:
            raise ValueError(f"{name} must be of shape (N, C, H, W) and not empty, got {tuple(given.shape)}")
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} must be finite, but {int((~given.isfinite()).sum())} pixels are not")
    if images.shape != originals.shape:
        shapes = f"{tuple(originals.shape)}, got {tuple(images.shape)}"
        raise ValueError(f"images must be of the shape of originals, {shapes}")
    return images.detach().to("cpu", torch.float64), originals.detach().to("cpu", torch.float64)
