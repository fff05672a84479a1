import math

import pytest
import torch

from gencore import Key, ops
from gencore.models.gan.objectives import OBJECTIVES, figures
from gencore.models.gan.penalties import clip_weights, gradient_penalty, squared_gradient

REAL = torch.tensor([0.7, -0.4, 1.5, -2.5], dtype=torch.float64)
FAKE = torch.tensor([-1.3, 0.2, -0.6, 3.0], dtype=torch.float64)


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


# The papers' formulas, of one image and one sample: of the discriminator, of the generator.
FORMULAS = {
    "minimax": (lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)), lambda r, f: math.log(1 - sigmoid(f))),
    "non-saturating": (
        lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
        lambda r, f: -math.log(sigmoid(f)),
    ),
    "least-squares": (lambda r, f: (r - 1) ** 2 / 2 + f**2 / 2, lambda r, f: (f - 1) ** 2 / 2),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
    "relativistic": (lambda r, f: -math.log(sigmoid(r - f)), lambda r, f: -math.log(sigmoid(f - r))),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_the_papers(name):
    objective, (discriminator, generator) = OBJECTIVES[name], FORMULAS[name]
    pairs = list(zip(REAL.tolist(), FAKE.tolist(), strict=True))
    expected = torch.tensor([discriminator(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(objective.discriminator(REAL, FAKE), expected)
    expected = torch.tensor([generator(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(objective.generator(FAKE, REAL), expected)
    assert FORMULAS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_down_the_losses_real_goes_up_and_fake_down_and_the_generator_opposes(name):
    real, fake = (t.clone().requires_grad_() for t in (torch.zeros(3), torch.zeros(3)))
    up, down = torch.autograd.grad(OBJECTIVES[name].discriminator(real, fake).sum(), (real, fake), allow_unused=True)
    assert (up < 0).all()
    assert (down >= 0).all()
    (gradient,) = torch.autograd.grad(OBJECTIVES[name].generator(fake, real.detach()).sum(), fake)
    assert (gradient < 0).all()


@pytest.mark.parametrize("name", ["minimax", "non-saturating", "relativistic"])
def test_logits_of_any_size_lose_no_digits(name):
    objective = OBJECTIVES[name]
    far = torch.tensor([200.0, -200.0])
    assert objective.discriminator(far, -far).tolist() == [0.0, 400.0]
    assert objective.generator(far, torch.zeros(2)).isfinite().all()
    # Minimax saturates where D is sure that an image is a sample; the others do not.
    fake = torch.tensor([-200.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(objective.generator(fake, torch.zeros(1)).sum(), fake)
    assert gradient.item() == pytest.approx(0.0 if name == "minimax" else -1.0)


def test_label_smoothing_is_the_cross_entropy_with_another_target():
    loss = OBJECTIVES["non-saturating"].discriminator(REAL, FAKE, 0.1)
    p, q = torch.sigmoid(REAL), torch.sigmoid(FAKE)
    torch.testing.assert_close(loss, -0.9 * p.log() - 0.1 * (1 - p).log() - (1 - q).log())


def test_figures():
    found = figures(OBJECTIVES["hinge"], REAL, FAKE)
    assert found.keys() == {"real", "fake", "accuracy"}
    assert found["real"] == REAL.mean()
    assert found["accuracy"] == 0.5
    assert figures(OBJECTIVES["least-squares"], REAL, FAKE)["accuracy"] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert figures(OBJECTIVES["relativistic"], REAL, FAKE)["accuracy"] == 0.5
    assert figures(OBJECTIVES["wasserstein"], REAL, FAKE).keys() == {"real", "fake"}


class Tiny(torch.nn.Module):
    """D(x) = v . tanh(W x), whose gradient is W^T (v (1 - tanh^2))."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.v = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, images):
        return torch.tanh(images.flatten(1) @ self.w.T) @ self.v

    def gradient(self, images):
        return (self.v * (1 - torch.tanh(images.flatten(1) @ self.w.T) ** 2)) @ self.w


IMAGES = ops.uniform((5, 1, 2, 2), Key(1), dtype=torch.float64)
SAMPLES = ops.uniform((5, 1, 2, 2), Key(2), dtype=torch.float64)


def test_the_squared_gradient_and_its_derivative_are_those_written_by_hand():
    tiny, images = Tiny(), IMAGES.clone().requires_grad_()
    penalty = squared_gradient(tiny(images), images)
    expected = tiny.gradient(IMAGES).square().sum(1)
    # The penalty is made in float32, whatever comes in.
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(penalty.mean(), tiny.parameters()),
        torch.autograd.grad(expected.mean(), tiny.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_gradient_penalty_and_its_derivative_are_those_written_by_hand():
    tiny, key = Tiny(), Key(3)
    penalty = gradient_penalty(tiny, IMAGES, SAMPLES, key)
    u = ops.uniform((5, 1, 1, 1), key).double()
    between = u * IMAGES + (1 - u) * SAMPLES
    expected = (tiny.gradient(between).norm(dim=1) - 1).square()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(penalty.mean(), tiny.parameters()),
        torch.autograd.grad(expected.mean(), tiny.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_are_mixed_by_factors_of_their_own_that_the_key_says():
    seen = []

    def judge(images):
        seen.append(images.detach())
        return images.sum((1, 2, 3))

    gradient_penalty(judge, torch.ones(6, 1, 2, 2), torch.zeros(6, 1, 2, 2), Key(0))
    gradient_penalty(judge, torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), Key(0).samples(4))
    whole, part = seen
    assert torch.equal(whole[4:], part)
    assert (whole == whole[:, :, :1, :1]).all()
    assert len(whole[:, 0, 0, 0].unique()) == 6


def test_a_gradient_of_zero_is_differentiated_without_nan():
    weight = torch.zeros(4, requires_grad=True)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ weight, IMAGES.float(), SAMPLES.float(), Key(0)).mean()
    assert penalty.item() == pytest.approx(1, rel=1e-5)
    assert torch.autograd.grad(penalty, weight)[0].isfinite().all()


def test_clipping():
    weights = [torch.nn.Parameter(torch.tensor([-3.0, -0.01, 0.5, 0.005]))]
    clip_weights(weights, 0.01)
    assert weights[0].tolist() == pytest.approx([-0.01, -0.01, 0.01, 0.005])
