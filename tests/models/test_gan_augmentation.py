import math

import numpy as np
import pytest
import torch

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.models.gan import augmentation
from gencore.models.gan.augmentation import Augmentation, AugmentationConfig, augmented

NAMES = ("flip", "rotate", "translate", "color", "cutout")
IMAGES = 2 * ops.uniform((64, 3, 16, 16), Key(1)) - 1
DRAWS = ops.uniform((64, 4), Key(2), dtype=torch.float64)


def check_each(transform, expected, images=IMAGES):
    """``expected(image, draws)`` of one image, as NumPy arrays."""
    found = transform(images, DRAWS)
    assert found.dtype == images.dtype
    for image, draws, ours in zip(images.numpy(), DRAWS.tolist(), found.numpy(), strict=True):
        np.testing.assert_allclose(ours, expected(image, draws), rtol=1e-5, atol=1e-6)


def test_flip():
    check_each(augmentation.flip, lambda image, u: image[:, :, ::-1] if u[0] < 0.5 else image)


def test_rotate():
    check_each(augmentation.rotate, lambda image, u: np.rot90(image, int(u[0] * 4), (1, 2)))


@pytest.mark.parametrize("shape", [(16, 16), (28, 28), (8, 12)])
def test_translate(shape):
    def expected(image, u):
        result = np.zeros_like(image)
        height, width = image.shape[1:]
        most = [int(size / 8 + 0.5) for size in (height, width)]
        down, right = (int(u[i] * (2 * most[i] + 1)) - most[i] for i in (0, 1))
        for row in range(height):
            for column in range(width):
                if 0 <= row - down < height and 0 <= column - right < width:
                    result[:, row, column] = image[:, row - down, column - right]
        return result

    check_each(augmentation.translate, expected, ops.normal((64, 2, *shape), Key(3)))


def test_color():
    def expected(image, u):
        image = image + u[0] - 0.5
        gray = image.mean(0, keepdims=True)
        image = gray + (image - gray) * 2 * u[1]
        return image.mean() + (image - image.mean()) * (0.5 + u[2])

    check_each(augmentation.color, expected)


@pytest.mark.parametrize("shape", [(16, 16), (9, 14)])
def test_cutout(shape):
    def expected(image, u):
        result = image.copy()
        bounds = []
        for size, draw in zip(image.shape[1:], u[:2], strict=True):
            length = int(size / 2 + 0.5)
            first = int(draw * (size + 1 - length % 2)) - length // 2
            bounds.append(slice(max(first, 0), max(first + length, 0)))
        result[:, bounds[0], bounds[1]] = 0
        return result

    check_each(augmentation.cutout, expected, ops.normal((64, 2, *shape), Key(3)))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_changed_with_the_probability_by_the_key_alone(name):
    images, key = ops.normal((3000, 1, 4, 4), Key(4)), Key(5)
    assert torch.equal(augmented(images, 0.0, key, [name]), images)
    changed = augmented(images, torch.tensor(0.4), key, [name])
    share = (changed != images).flatten(1).any(1).double().mean().item()
    # Half of the flips, a quarter of the turns and a ninth of the shifts leave an image as it is.
    expected = 0.4 * {"flip": 1 / 2, "rotate": 3 / 4, "translate": 8 / 9}.get(name, 1)
    assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 3000)
    assert torch.equal(augmented(images[100:], torch.tensor(0.4), key.samples(100), [name]), changed[100:])
    assert not torch.equal(augmented(images, 0.4, Key(6), [name]), changed)


def test_transforms_are_independent_of_each_other():
    key, images = Key(7), ops.normal((4000, 1, 4, 4), Key(4))
    gates = [(augmented(images, 0.5, key, [name]) != images).flatten(1).any(1).double() for name in NAMES]
    correlation = torch.corrcoef(torch.stack(gates))
    assert (correlation - torch.eye(5)).abs().max() < 4.5 / math.sqrt(4000)


def test_can_be_differentiated_twice():
    images = ops.normal((3, 2, 4, 4), Key(8), dtype=torch.float64).requires_grad_()

    def all_of_them(images):
        return augmented(images, 0.7, Key(9), NAMES)

    assert torch.autograd.gradcheck(all_of_them, (images,))
    assert torch.autograd.gradgradcheck(all_of_them, (images,))


def settings(**given):
    return AugmentationConfig(**given)


def test_the_probability_follows_the_signs():
    made = Augmentation(settings(target=0.5, images=100, every=2)).train()
    assert made.probability == 0
    for _ in range(2):
        made.observe(torch.tensor([1.0, 2.0, 0.1, 3.0, 0.5]))
        made.follow()
    # Ten images, all on the right side: a tenth of the way to 1.
    assert made.probability.item() == pytest.approx(0.1)
    assert not made.signs.any()
    assert made.minibatches == 0
    for _ in range(2):
        made.observe(torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]))
        made.follow()
    assert made.probability.item() == pytest.approx(0.0)
    for step in range(40):
        made.observe(torch.ones(10))
        made.follow()
        assert made.probability.item() == pytest.approx(min(1.0, (step + 1) // 2 * 0.2))


def test_at_the_target_it_stays():
    made = Augmentation(settings(probability=0.3, target=0.0, every=1)).train()
    made.observe(torch.tensor([1.0, -1.0]))
    made.follow()
    assert made.probability.item() == pytest.approx(0.3)


def test_parts_of_a_minibatch_count_together():
    whole, parts = (Augmentation(settings(every=1, images=50)).train() for _ in range(2))
    margins = ops.normal((12,), Key(0)) + 3
    whole.observe(margins)
    for part in margins.split(5):
        parts.observe(part)
    for made in (whole, parts):
        made.follow()
    assert whole.probability > 0
    assert torch.equal(whole.probability, parts.probability)


def test_evaluation_changes_nothing():
    made = Augmentation(settings(probability=1.0, every=1)).eval()
    made.observe(torch.ones(3))
    assert not made.pending.any()
    assert torch.equal(made(IMAGES, Key(0)), IMAGES)
    assert not torch.equal(made.train()(IMAGES, Key(0)), IMAGES)


def test_a_schedule():
    made = Augmentation(settings(probability=0.1, target=None, final=0.5)).train()
    for progress, expected in ((0.0, 0.1), (0.5, 0.3), (1.0, 0.5)):
        made.schedule(progress)
        made.observe(torch.ones(3))
        made.follow()
        assert made.probability.item() == pytest.approx(expected)
    fixed = Augmentation(settings(probability=0.2, target=None)).train()
    fixed.schedule(1.0)
    assert fixed.probability.item() == pytest.approx(0.2)


def test_what_a_checkpoint_holds():
    assert Augmentation(settings()).state_dict().keys() == {"probability", "signs", "minibatches"}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"transforms": ()}, r"transforms: must not be empty, was \(\)"),
        ({"transforms": ("flip", "flip")}, "transforms: must be different"),
        ({"transforms": ("blur",)}, r"transforms\[0\]: must be one of 'flip'"),
        ({"final": 0.5}, "final: must be none with a target, which moves the probability, was 0.5"),
        ({"probability": 1.5}, "probability: must be <= 1"),
    ],
)
def test_faults(given, fault):
    with pytest.raises(ConfigError, match=fault):
        settings(**given)
