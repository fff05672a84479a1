"""Principal component analysis: the decomposition against scikit-learn's, the model against closed forms."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.data import ImageDataset, load
from gencore.models import Autoencodes, HasLikelihoodBound
from gencore.models.linear import PCA, PCAConfig, decomposition, plugin, principal_components
from gencore.plugins import build_model, faults_with
from gencore.spec import Batch, DataSpec
from gencore.train import load as load_run
from gencore.train.config import TrainConfig
from gencore.train.trainer import Trainer


def images_of(number, size, seed=0):
    """Correlated values whose variances fall, about a mean."""
    scales = 2.0 ** -torch.arange(size, dtype=torch.float64)
    rotation = torch.linalg.qr(ops.normal((size, size), Key(seed), dtype=torch.float64)).Q
    return ops.normal((number, size), Key(seed).stream(1), dtype=torch.float64) * scales @ rotation + 3


def fitted(latent_size, data):
    model = build_model(plugin, PCAConfig(latent_size=latent_size), data.spec)
    model.start(None, data)
    return model.eval()


@pytest.fixture
def ways(request, monkeypatch):
    """The sizes of images and numbers of images from which each way of computing is taken."""
    monkeypatch.setattr(decomposition, "_MATRIX", {"covariance": 4096, "products": 32, "iteration": 8}[request.param])


@pytest.mark.parametrize(
    ("ways", "number"), [("covariance", 200), ("products", 30), ("iteration", 200)], indirect=["ways"]
)
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_components_are_scikit_learns(ways, number, block):
    from sklearn.decomposition import PCA as Theirs

    images = images_of(number, 40)
    theirs = Theirs(6, svd_solver="full").fit(images.numpy())
    found = principal_components(lambda: images.split(block), 6)
    torch.testing.assert_close(found.mean, torch.from_numpy(theirs.mean_), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.variances, torch.from_numpy(theirs.explained_variance_), rtol=1e-9, atol=0)
    # The directions are those of scikit-learn but for a sign, which is ours to fix.
    signs = (found.directions * torch.from_numpy(theirs.components_)).sum(1).sign()
    expected = torch.from_numpy(theirs.components_) * signs[:, None]
    torch.testing.assert_close(found.directions, expected, rtol=0, atol=1e-8)
    assert found.total == pytest.approx(theirs.explained_variance_.sum() / theirs.explained_variance_ratio_.sum())
    largest = found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("ways", ["covariance", "products", "iteration"], indirect=True)
def test_components_of_images_without_variance_are_orthonormal(ways):
    """Images on a line have one direction of variance, and the others are any that complete a basis."""
    images = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None] * torch.ones(40, dtype=torch.float64)
    found = principal_components(lambda: [images], 3)
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(3, dtype=torch.float64))
    assert found.variances[0] == pytest.approx(40 * images[:, 0].var().item())
    assert (found.variances[1:] < 1e-12).all()


@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        (torch.ones(1, 4), 1, "images must be at least two, got 1"),
        (torch.ones(3, 4), 3, "count must be at most 2 for 3 images of 4 values, got 3"),
        (torch.tensor([[1.0, math.nan], [1.0, 2.0]]), 1, "images must be finite"),
    ],
)
def test_bad_images_are_refused(images, count, message):
    with pytest.raises(ValueError, match=message):
        principal_components(lambda: [images], count)


def test_model_gives_back_what_lies_in_its_components():
    data = load("digits", "train")
    model, images = fitted(63, data), load("digits", "test").batch(torch.arange(50)).images
    assert isinstance(model, Autoencodes)
    mean, logvar = model.encode(images)
    # Components without variance, of pixels that are never set, lose what test images have there.
    errors = (model.decode(mean) - images).square().mean()
    assert errors < 1e-3
    assert logvar.shape == mean.shape
    fewer = fitted(10, data)
    assert (fewer.decode(fewer.encode(images)[0]) - images).square().mean() > 10 * errors
    assert fewer.explained_variance.sum() < model.explained_variance.sum() <= 1 + 1e-5
    assert fewer.principal_images.shape == (10, 1, 8, 8)
    training = fewer.encode(data.batch(torch.arange(len(data))).images)[0]
    torch.testing.assert_close(training.mean(0), torch.zeros(10), rtol=0, atol=1e-4)
    torch.testing.assert_close(training.T.cov(), torch.eye(10), rtol=0, atol=1e-3)


def test_likelihood_is_that_of_the_normal_distribution():
    model = fitted(5, load("digits", "train"))
    assert isinstance(model, HasLikelihoodBound)
    images = load("digits", "test").batch(torch.arange(20)).images
    found = model.log_likelihood_bound(Batch(images), Key(3))
    noise = ops.uniform(images.shape, Key(3).stream(1)).flatten(1).double()
    values = ((images.flatten(1).double() * 255).round() + noise) / 256
    directions, scale = model.directions.double(), (255 / 256) ** 2
    outside = torch.eye(64, dtype=torch.float64) - directions.T @ directions
    covariance = scale * (directions.T @ (model.variances.double()[:, None] * directions) + model.noise * outside)
    normal = MultivariateNormal((model.mean.double() * 255 + 0.5) / 256, covariance)
    expected = normal.log_prob(values) - 64 * math.log(256)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)
    parts = [model.log_likelihood_bound(Batch(images[:7]), Key(3)),
             model.log_likelihood_bound(Batch(images[7:]), Key(3).samples(7))]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), found)


def test_samples_have_the_moments_of_the_components_and_do_not_depend_on_the_batch():
    model = PCA(PCAConfig(latent_size=2), DataSpec((1, 2, 2)))
    model.mean.fill_(0.5)
    model.variances.copy_(torch.tensor([0.01, 0.0004]))
    samples = model.sample(4000, Key(1))
    assert torch.equal(samples, torch.cat([model.sample(1000, Key(1)), model.sample(3000, Key(1).samples(1000))]))
    flat = samples.flatten(1)
    # Five standard errors of 4,000 samples: a chance of less than 1e-5.
    torch.testing.assert_close(flat.mean(0), torch.full((4,), 0.5), rtol=0, atol=5 * 0.1 / 4000**0.5)
    torch.testing.assert_close(flat.var(0)[:2], model.variances, rtol=5 * (2 / 4000) ** 0.5, atol=0)
    assert (flat[:, 2:] == 0.5).all()


def test_a_run_is_whole_from_its_start(tmp_path):
    data = load("digits", "train")
    trainer = Trainer(
        plugin, PCAConfig(latent_size=5), data, TrainConfig(), tmp_path / "run", data_name="digits", progress=False
    )
    model = trainer.fit()
    again = load_run(tmp_path / "run")
    assert torch.equal(model.directions, again.directions)
    assert torch.equal(model.sample(3, Key(0)), again.sample(3, Key(0)))


def test_too_many_components_are_refused():
    few = load("digits", "train")
    assert list(faults_with(plugin, PCAConfig(latent_size=65), few.spec)) == [
        "latent_size: must be at most the 64 values of an image, was 65"
    ]
    images = torch.arange(8 * 64).reshape(8, 1, 8, 8).to(torch.uint8)
    with pytest.raises(ConfigError, match="latent_size: must be below the number of images, 8, was 8"):
        fitted(8, ImageDataset("few", "train", images))
