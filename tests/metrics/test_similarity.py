import math

import pytest
import torch
from scipy.ndimage import gaussian_filter

from gencore import Key, ops
from gencore.metrics import psnr, ssim


def pairs(n=3, channels=3, height=17, width=23):
    originals = ops.uniform((n, channels, height, width), Key(1))
    return (originals + 0.2 * ops.normal(tuple(originals.shape), Key(2))).clamp(0, 1), originals


def by_scipy(x, y):
    """One channel, by SciPy's filter, cut where it reaches beyond the image."""

    def blurred(image):
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    x, y = x.double().numpy(), y.double().numpy()
    mx, my = blurred(x), blurred(y)
    vx, vy, vxy = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    return ((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))).mean()


def test_ssim_is_the_formula():
    images, originals = pairs()
    expected = [sum(map(by_scipy, x, y)) / 3 for x, y in zip(images, originals, strict=True)]
    assert ssim(images, originals).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    images, originals = pairs()
    expected = [
        metrics.structural_similarity(x.double().numpy(), y.double().numpy(), channel_axis=0, **options)
        for x, y in zip(images, originals, strict=True)
    ]
    assert ssim(images, originals).tolist() == pytest.approx(expected, rel=1e-9)


def test_psnr_by_hand():
    originals = torch.zeros(3, 1, 2, 2)
    images = torch.stack((torch.full((1, 2, 2), 0.1), torch.eye(2)[None], torch.zeros(1, 2, 2)))
    assert psnr(images, originals).tolist() == pytest.approx([20, -10 * math.log10(0.5), math.inf])


def test_equal_images_are_equal():
    _, originals = pairs()
    assert ssim(originals, originals).tolist() == pytest.approx([1, 1, 1], rel=1e-12)
    flat = torch.full((1, 1, 11, 11), 0.5)
    # Of flat images only the means count: (2 * 0.5 * 0.25 + C1) / (0.5^2 + 0.25^2 + C1).
    assert ssim(flat, flat / 2).item() == pytest.approx(0.2501 / 0.3126, rel=1e-9)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_refuses(measure):
    images = torch.zeros(2, 1, 12, 12)
    with pytest.raises(ValueError, match=r"images must be of the shape of originals, \(1, 1, 12, 12\), got \(2, 1"):
        measure(images, images[:1])
    with pytest.raises(ValueError, match=r"originals must be of shape \(N, C, H, W\) and not empty, got \(12, 12\)"):
        measure(images, images[0, 0])
    with pytest.raises(ValueError, match="images must be finite, but 288 pixels are not"):
        measure(images * math.nan, images)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="images must be at least 11x11 pixels for SSIM, got 8x20"):
        ssim(torch.zeros(1, 1, 8, 20), torch.zeros(1, 1, 8, 20))
