import math

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import Key, ops
from gencore.data.digits import load_digits
from gencore.metrics import ClassifierFeatures, FeatureExtractor, HasClasses, features_of, train_classifier
from gencore.metrics.features import fingerprint_of, resized, rgb


class Means:
    """The mean of each channel."""

    name, size, fingerprint = "means", 3, "1"

    def __call__(self, images):
        return rgb(images).mean((2, 3))


def test_resizing_is_that_of_pillow_in_float():
    """As clean-fid does: each channel by Pillow in 32-bit float, so that nothing is rounded."""
    images = ops.uniform((2, 3, 40, 30), Key(1))
    for size in (13, 64):
        found = resized(images, size)
        for image, ours in zip(images.flatten(0, 1), found.flatten(0, 1), strict=True):
            theirs = Image.fromarray(image.numpy(), mode="F").resize((size, size), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), atol=2e-6)


def test_images_get_three_channels():
    gray = ops.uniform((2, 1, 4, 5), Key(1))
    assert torch.equal(rgb(gray), gray.expand(2, 3, 4, 5))
    opaque = torch.cat((gray, torch.ones(2, 1, 4, 5)), 1)
    torch.testing.assert_close(rgb(opaque), rgb(gray))
    # What cannot be seen is white.
    assert torch.equal(rgb(torch.zeros(1, 4, 2, 2)), torch.ones(1, 3, 2, 2))
    colours = ops.uniform((2, 3, 4, 5), Key(1))
    assert torch.equal(rgb(colours), colours)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 5, 4, 4), r"images must be of shape \(N, 1 to 4, H, W\), got \(2, 5, 4, 4\)"),
        (torch.zeros(2, 4, 4), r"images must be of shape \(N, 1 to 4, H, W\), got \(2, 4, 4\)"),
        (torch.tensor([[[[0.0]]], [[[math.nan]]]]), "images must be finite, but 1 of 2 hold NaN or infinity"),
    ],
)
def test_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        rgb(images)
    with pytest.raises(ValueError, match=f"the samples: {message}"):
        features_of(Means(), [images], 2, name="the samples")


def test_features_come_batch_by_batch(capsys):
    images = ops.uniform((7, 3, 4, 4), Key(2))
    found = features_of(Means(), images.split(3), 7, name="the samples")
    torch.testing.assert_close(found, images.mean((2, 3)))
    assert features_of(Means(), [], 0, name="none").shape == (0, 3)
    assert capsys.readouterr().err == ""
    for total in (6, 8):
        with pytest.raises(ValueError, match="the samples: "):
            features_of(Means(), images.split(3), total, name="the samples")


def test_the_classifier_is_an_extractor():
    train, test = load_digits(None, "train"), load_digits(None, "test")
    classifiers = [train_classifier(train, test, steps=steps) for steps in (3, 3, 4)]
    ours, same, other = (ClassifierFeatures(classifier) for classifier in classifiers)
    assert isinstance(ours, FeatureExtractor)
    assert isinstance(ours, HasClasses)
    images = test.batch(torch.arange(20)).images
    features = ours(images)
    assert features.shape == (20, ours.size)
    assert torch.equal(features, classifiers[0].features(images))
    torch.testing.assert_close(ours.probabilities(features), classifiers[0].probabilities(images))
    assert ours.fingerprint == same.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="images must be finite"):
        ours(images * math.nan)


def test_a_fingerprint_knows_weights_their_names_and_the_preparation():
    weights = {"a": torch.arange(3.0), "b": torch.ones((), dtype=torch.int64)}
    found = fingerprint_of("x", weights)
    assert found == fingerprint_of("x", dict(reversed(weights.items())))
    others = [
        fingerprint_of("y", weights),
        fingerprint_of("x", {**weights, "a": torch.tensor([0.0, 1.0, 3.0])}),
        fingerprint_of("x", {"c": weights["a"], "b": weights["b"]}),
    ]
    assert len({found, *others}) == 4
