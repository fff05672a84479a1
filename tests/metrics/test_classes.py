import math

import pytest
import torch
from torch import nn

from gencore import Key, ops
from gencore.data import ImageDataset
from gencore.data.digits import load_digits
from gencore.metrics import (
    Classifier,
    class_report,
    conditional_accuracy,
    draw_samples,
    train_classifier,
)
from gencore.models import GenerativeModel, ModelConfig


class Brightest(nn.Module):
    """The class is the brightest of the pixels; its probability is 1 where the others are black."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, images):
        return self.scale * images.flatten(1)


CLASSIFIER = Classifier(Brightest(), tuple("abcd"), 0.9)


def images_of(*classes):
    return torch.eye(4)[list(classes)].reshape(-1, 1, 2, 2)


class Sampler(GenerativeModel):
    """Samples of classes drawn by the key: ``of`` them, from the first on."""

    def __init__(self, of):
        super().__init__()
        self.config = ModelConfig(image_shape=tuple(images_of(0).shape[1:]))
        self.of = of
        self.sizes = []

    def sample(self, n, key, labels=None):
        assert not self.training
        self.sizes.append(n)
        return images_of(*(ops.uniform((n,), key) * self.of).long().tolist())


def test_report():
    report = class_report(CLASSIFIER, images_of(0, 0, 0, 0, 0, 0, 1, 1))
    assert report.counts == (6, 2, 0, 0)
    assert report.class_names == tuple("abcd")
    assert report.present == 2
    assert report.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert report.effective_classes == pytest.approx(math.exp(report.entropy))
    assert report.mean_confidence == pytest.approx(1)
    assert report.confident == 1
    assert report.test_accuracy == 0.9


def test_a_class_is_present_from_a_fifth_of_an_equal_share():
    # 4 classes: an equal share of 100 is 25, a fifth of it 5.
    assert class_report(CLASSIFIER, images_of(*[0] * 95, *[1] * 5)).present == 2
    assert class_report(CLASSIFIER, images_of(*[0] * 96, *[1] * 4)).present == 1


def test_confidence_is_low_for_images_of_no_class():
    assert class_report(CLASSIFIER, torch.full((10, 1, 2, 2), 0.5)).mean_confidence == pytest.approx(0.25)


def test_the_share_of_confident_images():
    # 50 x: the second of these is 50 * 0.05 from its rivals, 0.80 sure.
    images = torch.cat((images_of(0, 1), 0.05 * images_of(2, 3)))
    report = class_report(CLASSIFIER, images)
    assert report.confident == 0.5
    assert report.mean_confidence == pytest.approx((2 + 2 * math.exp(2.5) / (math.exp(2.5) + 3)) / 4)


def test_conditional_accuracy():
    images = images_of(0, 1, 2, 3)
    assert conditional_accuracy(CLASSIFIER, images, torch.tensor([0, 1, 2, 3])) == 1
    assert conditional_accuracy(CLASSIFIER, images, torch.tensor([0, 1, 3, 2])) == 0.5
    for wrong in (torch.arange(3), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match="labels must be one for each of at least one image, got 4 images"):
            conditional_accuracy(CLASSIFIER, images, wrong)


def test_features_are_what_the_last_layer_sees():
    train, test = load_digits(None, "train"), load_digits(None, "test")
    classifier = train_classifier(train, test, steps=3)
    images = test.batch(torch.arange(20)).images
    features = classifier.features(images)
    assert features.shape == (20, 256)
    assert not features.requires_grad
    probabilities = torch.softmax(classifier.network.head(features), 1)
    torch.testing.assert_close(probabilities, classifier.probabilities(images))
    with pytest.raises(TypeError, match="network must have a method features, and Brightest has none"):
        CLASSIFIER.features(images_of(0))


def test_samples_are_drawn_with_the_labels_of_each_batch():
    model, seen = Sampler(4), []
    model.weight = nn.Parameter(torch.zeros(1))
    model.sample = lambda n, key, labels: seen.append(labels.tolist()) or images_of(*labels.tolist())
    labels = torch.tensor([3, 1, 0, 2, 2])
    samples = draw_samples(model, Key(0), n=5, batch_size=2, labels=labels)
    assert seen == [[3, 1], [0, 2], [2]]
    assert torch.equal(samples, images_of(*labels.tolist()))
    with pytest.raises(ValueError, match=r"labels must be of shape \(5,\), got \(4,\)"):
        draw_samples(model, Key(0), n=5, labels=labels[:4])


def test_collapse_is_seen():
    whole = class_report(CLASSIFIER, draw_samples(Sampler(4).train(), Key(0), n=400))
    assert whole.present == 4
    assert whole.effective_classes > 3.9
    collapsed = class_report(CLASSIFIER, draw_samples(Sampler(1), Key(0), n=400))
    assert collapsed.present == 1
    assert collapsed.effective_classes == 1


def test_samples_do_not_depend_on_the_batch_size():
    model = Sampler(4)
    reports = {class_report(CLASSIFIER, draw_samples(model, Key(0), n=10, batch_size=size)) for size in (3, 10, 99)}
    assert len(reports) == 1
    assert model.sizes == [3, 3, 3, 1, 10, 10]
    assert sum(next(iter(reports)).counts) == 10


def test_images_that_are_not_finite_are_of_no_class():
    broken = images_of(0, 1, 2)
    broken[0] = math.nan
    report = class_report(CLASSIFIER, broken)
    assert report.counts == (0, 1, 1, 0)
    assert math.isnan(report.mean_confidence)
    assert conditional_accuracy(CLASSIFIER, broken, torch.tensor([0, 1, 2])) == pytest.approx(2 / 3)
    assert math.isnan(class_report(CLASSIFIER, broken[:1]).effective_classes)


def test_classifier_learns_digits_and_draws_nothing_from_torch():
    train, test = load_digits(None, "train"), load_digits(None, "test")
    before = torch.get_rng_state()
    classifier = train_classifier(train, test, steps=150)
    assert torch.equal(torch.get_rng_state(), before)
    assert classifier.test_accuracy > 0.93
    images = test.batch(torch.arange(len(test))).images
    probabilities = classifier.probabilities(images)
    assert probabilities.shape == (297, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(297))
    found = (probabilities.argmax(1) == test.labels).double().mean().item()
    assert found == classifier.test_accuracy
    report = class_report(classifier, images)
    assert report.present == 10
    assert torch.tensor(report.counts).sub(test.labels.bincount()).abs().max() <= 6


def test_classifier_is_a_function_of_data_and_seed():
    train, test = load_digits(None, "train"), load_digits(None, "test")
    once, again, other = (train_classifier(train, test, seed=seed, steps=3).network.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not any(torch.equal(once[name], other[name]) for name in once)


def test_refuses():
    unlabelled = ImageDataset("toy", "train", torch.zeros(3, 1, 2, 2, dtype=torch.uint8))
    digits = load_digits(None, "test")
    with pytest.raises(ValueError, match="must have labels, but toy has none"):
        train_classifier(unlabelled, digits)
    other = ImageDataset("toy", "test", digits.images[:, :, 1:], digits.labels, digits.class_names)
    with pytest.raises(ValueError, match="train and test must have the same image shape and classes"):
        train_classifier(digits, other)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train_classifier(digits, digits, steps=0)
    with pytest.raises(ValueError, match="images must hold at least one image"):
        class_report(CLASSIFIER, torch.zeros(0, 1, 2, 2))
    with pytest.raises(ValueError, match="n and batch_size must be at least 1, got 0 and 250"):
        draw_samples(Sampler(1), Key(0), n=0)
