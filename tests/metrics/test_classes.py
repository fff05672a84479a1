import math

import pytest
import torch
from torch import nn

from gencore import Key, ops
from gencore.config import ConfigError
from gencore.data import ImageDataset
from gencore.data.digits import load_digits
from gencore.metrics import (
    Classifier,
    class_report,
    conditional_accuracy,
    draw_samples,
    sample_batches,
    train_classifier,
)
from gencore.models import GenerativeModel, ModelConfig, SamplingConfig
from gencore.plugins import PluginError
from gencore.processes import Processes
from gencore.spec import Condition, DataSpec


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


SPEC = DataSpec((1, 2, 2), (Condition("label", "class", tuple("abcd")), Condition("text", "text")))


class Sampler(GenerativeModel):
    """Samples of the classes that it is told, or else of classes drawn by the key: ``of`` them, from the first on."""

    takes = {"label": "optional", "text": "optional"}  # noqa: RUF012
    sampling = SamplingConfig()

    def __init__(self, of):
        super().__init__(ModelConfig(), SPEC)
        self.of = of
        self.draws = []

    def generate(self, draw):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.draws.append(draw)
        labels = draw.conditions.get("label", (ops.uniform((draw.n,), draw.key) * self.of).long())
        return images_of(*labels.tolist())


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


def test_samples_are_drawn_with_the_conditions_of_each_batch():
    model = Sampler(4)
    labels, texts = torch.tensor([3, 1, 0, 2, 2]), list("vwxyz")
    samples = draw_samples(model, Key(0), n=5, batch_size=2, conditions={"label": labels, "text": texts})
    assert [draw.conditions["label"].tolist() for draw in model.draws] == [[3, 1], [0, 2], [2]]
    assert [draw.conditions["text"] for draw in model.draws] == [("v", "w"), ("x", "y"), ("z",)]
    assert torch.equal(samples, images_of(*labels.tolist()))
    for wrong, name in (({"label": labels[:4]}, "label"), ({"label": labels, "text": texts[:4]}, "text")):
        with pytest.raises(ValueError, match=rf"conditions\['{name}'\] must be one for each of 5 samples, got 4"):
            draw_samples(model, Key(0), n=5, conditions=wrong)
    # What the model refuses is no fault of a plugin where no plugin built it.
    with pytest.raises(ValueError, match="conditions must not hold 'labels': this model takes label and text alone"):
        draw_samples(model, Key(0), n=5, conditions={"labels": labels})


def test_samples_are_drawn_as_they_are_asked_for():
    model, sampling = Sampler(4), SamplingConfig()
    draw_samples(model, Key(0), n=3)
    draw_samples(model, Key(0), n=3, sampling=sampling)
    assert [draw.sampling is chosen for draw, chosen in zip(model.draws, (model.sampling, sampling), strict=True)]
    assert not any(draw.check_finite or draw.progress for draw in model.draws)
    list(sample_batches(model, Key(0), n=3, check_finite=True, progress=True))
    list(sample_batches(model, Key(0), n=3, batch_size=2, progress=True))
    # Of one batch the model says how far it is, of several the caller does.
    assert [(draw.check_finite, draw.progress) for draw in model.draws[2:]] == [(True, True), *[(False, False)] * 2]


def test_batches_are_computed_when_they_are_asked_for():
    model = Sampler(4)
    batches = sample_batches(model, Key(0), n=5, batch_size=2)
    assert model.draws == []
    next(batches)
    assert len(model.draws) == 1
    assert torch.equal(torch.cat(list(batches)), draw_samples(Sampler(4), Key(0), n=5)[2:])


class Part(Processes):
    """One of several processes, to which the others give nothing."""

    def gathered(self, values):
        return [values]


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 1, 0, 2, 2])])
@pytest.mark.parametrize("batch_size", [1, 2, 250])
def test_processes_share_the_samples(batch_size, labels):
    """Each makes its own rows of every batch, of which there may be none, with their conditions."""
    conditions = {} if labels is None else {"label": labels}
    models = [Sampler(4) for _ in range(3)]
    parts = [
        sample_batches(
            model, Key(0), n=5, batch_size=batch_size, conditions=conditions, processes=Part(rank, len(models))
        )
        for rank, model in enumerate(models)
    ]
    together = torch.cat([torch.cat(batch) for batch in zip(*parts, strict=True)])
    assert torch.equal(together, draw_samples(Sampler(4), Key(0), n=5, conditions=conditions))
    made = [[draw.n for draw in model.draws] for model in models]
    assert sum(map(sum, made)) == 5
    assert max(map(max, made)) <= batch_size


@pytest.mark.parametrize(
    ("generate", "cause"),
    [
        (lambda draw: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda draw: None, "TypeError: it must return a dense tensor, got NoneType"),
        (lambda draw: images_of(0), r"ValueError: it must return images of shape \(2, 1, 2, 2\), got \(1, 1, 2, 2\)"),
        (lambda draw: images_of(0, 1).long(), "TypeError: it must return images of a floating dtype, got torch.int64"),
    ],
)
def test_a_plugin_whose_samples_fail_is_named(generate, cause):
    model = Sampler(4)
    model.generate, model.plugin_name = generate, "zoo"
    with pytest.raises(PluginError, match=rf"model plugin 'zoo' is broken: sample\(\) of samples 0 to 1: {cause}"):
        draw_samples(model, Key(0), n=5, batch_size=2)


@pytest.mark.parametrize("error", [ConfigError("sampling", ["steps: must be 1"]), FloatingPointError("call 0")])
def test_what_a_model_refuses_is_no_fault_of_its_plugin(error):
    def refuse(draw):
        raise error

    model = Sampler(4)
    model.generate, model.plugin_name = refuse, "zoo"
    with pytest.raises(type(error)) as info:
        draw_samples(model, Key(0), n=5)
    assert info.value is error


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
    assert [draw.n for draw in model.draws] == [3, 3, 3, 1, 10, 10]
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
    with pytest.raises(ValueError, match="the data set must have classes, but toy has none"):
        train_classifier(unlabelled, digits)
    with pytest.raises(ValueError, match="the data set must have classes, but toy has none"):
        train_classifier(digits, unlabelled)
    names = digits.spec.class_names
    other = ImageDataset("toy", "test", digits.images[:, :, 1:], digits.labels, names)
    with pytest.raises(ValueError, match="train and test must have the same image shape and classes"):
        train_classifier(digits, other)
    renamed = ImageDataset("toy", "test", digits.images, digits.labels, names[::-1])
    with pytest.raises(ValueError, match="train and test must have the same image shape and classes"):
        train_classifier(digits, renamed)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train_classifier(digits, digits, steps=0)
    with pytest.raises(ValueError, match="images must hold at least one image"):
        class_report(CLASSIFIER, torch.zeros(0, 1, 2, 2))
    with pytest.raises(ValueError, match="n and batch_size must be at least 1, got 0 and 250"):
        draw_samples(Sampler(1), Key(0), n=0)
