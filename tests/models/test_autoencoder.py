"""The autoencoder: its loss against the formula, what is tied, and that it learns more than as many components."""

import math

import pytest
import torch
from torch.nn import functional as F

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.data import load
from gencore.models import Adam, Autoencodes, Step
from gencore.models.autoencoder import Autoencoder, AutoencoderConfig, plugin
from gencore.models.linear import plugin as pca
from gencore.plugins import faults_with
from gencore.spec import Batch, DataSpec
from gencore.train.config import TrainConfig
from gencore.train.trainer import Trainer

CONFIGS = {
    "mlp": AutoencoderConfig(hidden_sizes=(24,), latent_size=4),
    "tied": AutoencoderConfig(hidden_sizes=(24, 12), latent_size=4, tied=True),
    "conv": AutoencoderConfig(network="conv", hidden_sizes=(8, 6), latent_size=4, loss="cross-entropy"),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return Autoencoder(CONFIGS[request.param], DataSpec((2, 7, 9)))


def test_shapes_and_protocols(model):
    model.eval()
    images = ops.uniform((6, 2, 7, 9), Key(1))
    codes, logvar = model.encode(images)
    assert isinstance(model, Autoencodes)
    assert codes.shape == (6, 4)
    assert (logvar == -math.inf).all()
    assert model.decode(codes).shape == images.shape
    samples = model.sample(7, Key(3))
    apart = torch.cat([model.sample(3, Key(3)), model.sample(4, Key(3).samples(3))])
    torch.testing.assert_close(samples, apart, rtol=1e-5, atol=1e-6)
    assert 0 <= samples.min() <= samples.max() <= 1


def test_loss_is_the_error_of_the_image_and_trains_every_parameter(model):
    images = ops.uniform((6, 2, 7, 9), Key(1))
    (phase,) = model.phases()
    loss = phase.loss(Step(Batch(images), Key(0)))
    codes = model.encoder(2 * images - 1)
    # Standardised by the minibatch's own moments.
    codes = (codes - codes.mean(0)) / (codes.var(0, unbiased=False) + model.standardize.eps).sqrt()
    images_again = model.decode(codes)
    errors = (images_again - images).square()
    torch.testing.assert_close(loss.metrics["mean_squared_error"], errors.mean())
    if model.config.loss == "cross-entropy":
        errors = F.binary_cross_entropy(images_again, images, reduction="none")
    torch.testing.assert_close(loss.value, errors.flatten(1).sum(1).mean())
    loss.value.backward()
    assert {id(p) for p in phase.optimizer.parameters} == {id(p) for p in model.parameters()}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tied_weights_are_the_encoders():
    torch.manual_seed(0)
    model = Autoencoder(CONFIGS["tied"], DataSpec((1, 4, 4))).eval()
    # Biases alone are the decoder's own.
    assert [tuple(p.shape) for p in model.decoder.parameters()] == [(12,), (24,), (16,)]
    first, second, last = (layer.weight for layer in model.encoder.layers if hasattr(layer, "weight"))
    latents = ops.normal((3, 4), Key(0))
    hidden = F.silu(latents @ last + model.decoder.biases[0])
    hidden = F.silu(hidden @ second + model.decoder.biases[1])
    expected = torch.sigmoid(hidden @ first + model.decoder.biases[2]).reshape(3, 1, 4, 4)
    torch.testing.assert_close(model.decode(latents), expected)


def test_learns_more_than_as_many_principal_components(tmp_path, one_thread):
    data, test = load("digits", "train"), load("digits", "test")
    images = test.batch(torch.arange(len(test))).images

    def error(plugin, settings, steps):
        config, train = plugin.config_of(settings), TrainConfig(steps=steps, batch_size=100, schedule="cosine")
        trainer = Trainer(plugin, config, data, train, tmp_path / plugin.name, data_name="digits", progress=False)
        model = trainer.fit()
        with torch.no_grad():
            return (model.decode(model.encode(images)[0]) - images).square().mean().item()

    settings = {"latent_size": 4, "hidden_sizes": (128, 64), "optimizer": {"lr": 3e-3}}
    assert error(plugin, settings, 600) < 0.8 * error(pca, {"latent_size": 4}, 1)
    assert Adam(lr=3e-3) == plugin.config_of(settings).optimizer


def test_settings_that_go_with_nothing_are_refused():
    with pytest.raises(ConfigError, match="tied: must be false for network='conv', was true"):
        AutoencoderConfig(network="conv", tied=True)
    with pytest.raises(ConfigError, match="hidden_sizes: must not be empty for network='conv'"):
        AutoencoderConfig(network="conv", hidden_sizes=())
    config = AutoencoderConfig(network="conv", hidden_sizes=(4, 4, 4, 4))
    assert list(faults_with(plugin, config, DataSpec((1, 8, 8)))) == [
        "hidden_sizes: must have at most 3 levels for images of 8 pixels, was 4"
    ]
