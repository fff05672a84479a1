import math

import pytest
import torch

from gencore.data.digits import load_digits
from gencore.metrics import psnr, reconstruction
from gencore.models import GenerativeModel, ModelConfig

DATA = load_digits(None, "test")


class Halver(GenerativeModel):
    """An encoder that keeps the upper half, with dropout that must not be heard of."""

    latent_shape = (1, 4, 8)

    def __init__(self, spec=DATA.spec):
        super().__init__(ModelConfig(), spec)
        self.dropout = torch.nn.Dropout(0.9)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images):
        return self.dropout(images[:, :, :4]), torch.zeros(len(images), 1, 4, 8)

    def decode(self, latents):
        return torch.cat((latents, latents), 2)


class Layers:
    name, size, fingerprint = "layers", 1, "1"

    def __call__(self, images):
        return images.mean((1, 2, 3))[:, None]

    def layers(self, images):
        return [images + 1]


def test_means_over_the_first_images():
    model = Halver().train()
    found = reconstruction(model, DATA, limit=21, batch_size=10, extractor=Layers())
    images = DATA.batch(torch.arange(21)).images
    expected = psnr(torch.cat((images[:, :, :4], images[:, :, :4]), 2), images)
    assert (found.images, found.ssim) == (21, None)
    assert found.psnr.value == pytest.approx(expected.mean().item(), rel=1e-9)
    assert found.psnr.standard_error == pytest.approx(expected.std().item() / math.sqrt(21), rel=1e-9)
    # One channel has one direction.
    assert found.perceptual.value == pytest.approx(0, abs=1e-6)
    assert model.training
    assert reconstruction(model, DATA, limit=5).perceptual is None


def test_refuses():
    with pytest.raises(TypeError, match="model must have encode and decode, and GenerativeModel has not"):
        reconstruction(GenerativeModel(ModelConfig(), DATA.spec), DATA)
    with pytest.raises(ValueError, match="batch_size and limit must be at least 1, got 0 and None"):
        reconstruction(Halver(), DATA, batch_size=0)
