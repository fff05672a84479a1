"""What can be done with latents, in Python."""

from __future__ import annotations

import math

import pytest
import torch

from gencore import Key, ops
from gencore.models import latents
from gencore.models.gan import GAN, GANConfig
from gencore.models.vae import VAE, VAEConfig
from gencore.spec import DataSpec

SPEC = DataSpec((1, 6, 5))


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(latent_size=4, hidden_sizes=(16,)), SPEC).eval()


@pytest.fixture
def gan():
    torch.manual_seed(0)
    return GAN(GANConfig(), SPEC).eval()


def test_an_arc_keeps_lengths():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    path = latents.path_between(a, b, 5)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path.norm(dim=1), torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0]))
    torch.testing.assert_close(path[2], torch.tensor([2.0, 2.0]) / 2**0.5)
    angles = torch.atan2(path[:, 1], path[:, 0])
    torch.testing.assert_close(angles.diff(), torch.full((4,), math.pi / 8))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_a_line_is_straight_and_so_is_what_is_no_arc(shape):
    a, b = torch.randn(shape), torch.randn(shape)
    path = latents.path_between(a, b, 3, "linear")
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    torch.testing.assert_close(path[1], (a + b) / 2)
    torch.testing.assert_close(latents.path_between(a, 2 * a, 3), torch.stack((a, 1.5 * a, 2 * a)))
    assert latents.path_between(a, -a, 3)[1].abs().max() < 1e-6
    assert latents.path_between(a, 0 * a, 3).isfinite().all()


def test_a_small_angle_is_an_arc_to_the_last_digits():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for angle in (0.9e-3, 1.1e-3, math.pi - 1.1e-3):
        b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        middle = latents.path_between(a, b, 3)[1]
        want = torch.tensor([math.cos(angle / 2), math.sin(angle / 2)], dtype=torch.float64)
        torch.testing.assert_close(middle, want, rtol=0, atol=2e-7)  # the chord of the smallest is 1e-7 shorter


def test_one_dimension_changes():
    latent = torch.randn(2, 3)
    found = latents.traversal(latent, [4, 0], torch.tensor([-1.0, 0.0, 1.0]))
    assert found.shape == (2, 3, 2, 3)
    assert found[0, :, 1, 1].tolist() == found[1, :, 0, 0].tolist() == [-1, 0, 1]
    assert ((found != latent).flatten(2).sum(2) <= 1).all()
    with pytest.raises(ValueError, match="dimensions must be from 0 to 5, got 6"):
        latents.traversal(latent, [6], torch.zeros(1))


def test_information_is_the_divergence():
    mean, logvar = torch.randn(7, 2, 3), torch.randn(7, 2, 3)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).flatten(1).mean(0)
    torch.testing.assert_close(latents.information(mean, logvar), want)


@pytest.mark.parametrize(
    ("expression", "known", "terms"),
    [
        ("3 - 1 + 7", "0 1 3 7", [(1, "3"), (-1, "1"), (1, "7")]),
        ("3-1+7", "0 1 3 7", [(1, "3"), (-1, "1"), (1, "7")]),
        (" - a+ b ", "", [(-1, "a"), (1, "b")]),
        ("+s12, s15,s33 - s1", "", [(1, "s12 s15 s33"), (-1, "s1")]),
    ],
)
def test_expressions(expression, known, terms):
    want = tuple(latents.Term(sign, tuple(names.split())) for sign, names in terms)
    assert latents.parsed(expression, known.split()) == want


def test_names_may_hold_signs():
    known = ["t-shirt", "a - b", "a", "dog, small", "7", "77"]
    found = latents.parsed("t-shirt - a - b - a + dog, small,77", known)
    assert [(term.sign, term.names) for term in found] == [
        (1, ("t-shirt",)), (-1, ("a - b",)), (-1, ("a",)), (1, ("dog, small", "77"))
    ]  # fmt: skip
    assert [str(term) for term in found] == ["t-shirt", "- a - b", "- a", "dog, small,77"]


@pytest.mark.parametrize("expression", ["", " ", "+", "a +", "a - - b", "a b", ", a", "a,", "a,,b"])
def test_what_is_no_expression(expression):
    with pytest.raises(ValueError, match=r"expression must be names with \+ and - between them, got "):
        latents.parsed(expression)


def test_means_of_classes():
    values, labels = torch.randn(6, 2, 2), torch.tensor([0, 2, 2, -1, 0, 0])
    means, counts = latents.class_means(values, labels, 3)
    assert counts.tolist() == [3, 0, 2]
    torch.testing.assert_close(means[0], values[[0, 4, 5]].mean(0))
    torch.testing.assert_close(means[2], values[[1, 2]].mean(0))
    assert means[1].isnan().all()


def test_the_prior_is_that_of_the_key(gan):
    found = latents.prior(gan, 5, Key(1))
    assert torch.equal(found, ops.normal((5, *gan.latent_shape), Key(1)))
    assert torch.equal(found[2:], latents.prior(gan, 3, Key(1).samples(2)))


def test_a_projection_finds_what_the_model_can_make(vae):
    truth = latents.prior(vae, 3, Key(5))
    images = vae.decode(truth).detach()
    found = latents.project(vae, images, Key(0), steps=300, learning_rate=0.1)
    torch.testing.assert_close(found.start, vae.encode(images)[0].detach())
    assert (found.distances < 1e-3 * found.start_distances).all()
    torch.testing.assert_close(found.images, vae.decode(found.latents).detach())
    torch.testing.assert_close(found.distances, (found.images - images).square().flatten(1).mean(1))
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert not found.latents.requires_grad
    part = latents.project(vae, images[1:], Key(0), steps=300, learning_rate=0.1)
    torch.testing.assert_close(part.latents, found.latents[1:], rtol=1e-2, atol=1e-2)


def test_without_an_encoder_it_starts_with_the_best_of_the_prior(gan):
    candidates = latents.prior(gan, 300, Key(0))
    images = gan.decode(candidates[[270, 3]]).detach()
    found = latents.project(gan, images + 0.001, Key(0), steps=0, candidates=300)
    assert torch.equal(found.start, candidates[[270, 3]])
    assert torch.equal(found.latents, found.start)
    torch.testing.assert_close(found.distances, torch.full((2,), 1e-6), rtol=1e-2, atol=0)


def test_the_result_is_never_worse_than_the_start(vae):
    images = vae.decode(latents.prior(vae, 3, Key(5))).detach()
    vae.train()
    found = latents.project(vae, images, Key(0), steps=5, learning_rate=50)
    assert (found.distances <= found.start_distances).all()
    assert vae.training


def test_what_cannot_be_projected(vae, monkeypatch):
    images = torch.zeros(2, *SPEC.image_shape)
    for arguments, options, error, message in (
        ((vae, images[:, :, 1:], Key(0)), {}, ValueError, "images must be of shape"),
        ((vae, images, Key(0)), {"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ((vae, images, Key(0)), {"learning_rate": 0}, ValueError, "learning_rate must be above 0, got 0"),
        ((vae, images, Key(0)), {"candidates": 0}, ValueError, "candidates must be at least 1, got 0"),
        ((torch.nn.Linear(1, 1), images, Key(0)), {}, TypeError, "model must have latents"),
    ):
        with pytest.raises(error, match=message):
            latents.project(*arguments, **options)
    decode = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda self, z: decode(self, z).detach())
    with pytest.raises(ValueError, match="model must have a decode with a gradient, and that of VAE has none"):
        latents.project(vae, images, Key(0))


def test_paths_of_other_kinds_are_refused():
    a = torch.zeros(3)
    for arguments, message in (
        ((a, torch.zeros(4), 3), "a and b must have one shape"),
        ((a, a, 1), "steps must be at least 2, got 1"),
        ((a, a, 3, "curved"), 'path must be "linear" or "spherical", got \'curved\''),
    ):
        with pytest.raises(ValueError, match=message):
            latents.path_between(*arguments)
