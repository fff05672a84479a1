"""gencore reconstruct, interpolate, traverse, arithmetic and project."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import Key, data, metrics, ops, pictures
from gencore.cli.common import first_in_random_order
from gencore.data import DatasetPlugin, ImageDataset
from gencore.train import load


@pytest.mark.parametrize(
    ("command", "file"),
    [("reconstruct", "reconstructions.png"), ("interpolate", "interpolations.png"), ("traverse", "traversal.png")],
)
def test_pictures_are_written(gencore, trained, tmp_path, command, file):
    result = gencore(command, trained / "toy")
    assert (result.code, result.err) == (0, "")
    assert file in result.out
    assert Image.open(trained / "toy" / file).width > 100
    gencore(command, trained / "toy", "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (trained / "toy" / file).read_bytes()


@pytest.mark.parametrize(
    ("command", "message"),
    [("reconstruct", "has no encoder"), ("interpolate", "has no latent code"), ("traverse", "has no latent code")],
)
def test_a_model_without_latents_is_refused(gencore, trained, command, message):
    result = gencore(command, trained / "toy-sampler")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err


def test_more_images_than_there_are_is_an_error(gencore, trained):
    result = gencore("reconstruct", trained / "toy", "-n", 41)
    assert (result.code, result.err) == (2, "gencore: data set bars has 40 test images; 41 were requested\n")


def test_defaults_fit_few_images(gencore, trained, tmp_path, monkeypatch):
    few = ImageDataset("few", "test", torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    monkeypatch.setattr(sys.modules["gencore_toy"], "bars", DatasetPlugin("bars", lambda path, split: few))
    for command, said in (("reconstruct", ""), ("interpolate", "1 spherical interpolations"), ("traverse", "")):
        result = gencore(command, trained / "toy", "--out", tmp_path / "a.png")
        assert (result.code, result.err) == (0, "")
        assert said in result.out
    result = gencore("interpolate", trained / "toy", "--rows", 2)
    assert (result.code, result.err) == (2, "gencore: data set few has 3 test images; 4 were requested\n")


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_an_error_of_a_plugin_names_it(gencore, trained, tmp_path, monkeypatch, method):
    def broken(self, tensor):
        raise KeyError("x")

    monkeypatch.setattr(sys.modules["gencore_toy"].Toy, method, broken)
    result = gencore("reconstruct", trained / "toy", "--out", tmp_path / "a.png")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert f"of package gencore-toy 1.0 is broken: {method}(): KeyError: 'x'" in result.err


def test_an_interpolation_is_straight_or_an_arc(gencore, trained, tmp_path):
    written = {}
    for path in ("linear", "spherical"):
        result = gencore("interpolate", trained / "toy", "--path", path, "--out", tmp_path / f"{path}.png")
        assert (result.code, result.err) == (0, "")
        assert f"8 {path} interpolations between test images" in result.out
        written[path] = (tmp_path / f"{path}.png").read_bytes()
    assert written["linear"] != written["spherical"]
    result = gencore("interpolate", trained / "toy", "--path", "curved")
    assert (result.code, len(result.err.splitlines())) == (2, 1)


@pytest.fixture
def drawn(monkeypatch):
    """The images and captions of the pictures that are drawn."""
    calls, grid = [], pictures.grid

    def spied(images, *args, **options):
        calls.append((images, options.get("captions")))
        return grid(images, *args, **options)

    monkeypatch.setattr(pictures, "grid", spied)
    return calls


def test_samples_are_shown_with_their_numbers_and_added(gencore, trained, tmp_path, drawn):
    model = load(trained / "toy")
    latents = ops.normal((64, 3), Key(3))
    result = gencore("arithmetic", trained / "toy", "--seed", 3, "--out", tmp_path / "a.png")
    assert (result.code, result.err) == (0, "")
    assert "samples of seed 3 with their numbers" in result.out
    images, captions = drawn.pop()
    torch.testing.assert_close(images, model.decode(latents).detach())
    assert captions == [f"s{i}" for i in range(64)]
    expression = "s5,s7 - s1 + s63"
    result = gencore(
        "arithmetic", trained / "toy", "--expression", expression, "--seed", 3, "--out", tmp_path / "a.png"
    )
    assert (result.code, result.err) == (0, "")
    assert expression in result.out
    images, captions = drawn.pop()
    mean = (latents[5] + latents[7]) / 2
    want = torch.stack([mean, latents[1], latents[63], mean - latents[1] + latents[63]])
    torch.testing.assert_close(images, model.decode(want).detach())
    assert captions == ["s5,s7", "- s1", "+ s63", "= result"]


def test_classes_are_means_of_codes(gencore, trained, tmp_path, drawn):
    model, test = load(trained / "toy"), data.load("bars", "test")
    codes = model.encode(test.batch(torch.arange(len(test))).images)[0]
    labels = test.batch(torch.arange(len(test))).conditions["label"]
    first, second = (codes[labels == each].mean(0) for each in (0, 1))
    names = test.spec.class_names
    expression = f"{names[0]} - {names[1]}"
    result = gencore("arithmetic", trained / "toy", "--expression", expression, "--out", tmp_path / "a.png")
    assert (result.code, result.err) == (0, "")
    want = model.decode(torch.stack([first, second, first - second])).detach()
    torch.testing.assert_close(drawn.pop()[0], want, rtol=1e-5, atol=1e-5)


def test_without_an_encoder_a_classifier_tells_samples_apart(gencore, trained, tmp_path, drawn, monkeypatch):
    """Of the darker and the brighter half of samples, by a classifier that is sure of it or not at all."""
    model, latents = load(trained / "toy"), ops.normal((300, 3), Key(0))
    brightness = model.decode(latents).detach().flatten(1).mean(1)
    middle = brightness.median()

    class Brightness(torch.nn.Identity):
        def forward(self, images):
            bright = 1000 * (images.flatten(1).mean(1) - middle)
            others = torch.full((len(images), len(names) - 2), -1e4)
            return torch.cat((torch.stack((-bright, bright), 1), others), 1)

    names = data.load("bars", "test").spec.class_names
    network = Brightness()
    network.register_parameter("somewhere", torch.nn.Parameter(torch.zeros(())))  # which says the device
    classifier = metrics.Classifier(network, names, 1.0)
    monkeypatch.setattr(metrics, "train_classifier", lambda *args, **options: classifier)
    monkeypatch.delattr(sys.modules["gencore_toy"].Toy, "encode")
    options = ["-n", 300, "--out", tmp_path / "a.png"]
    result = gencore("arithmetic", trained / "toy", "--expression", names[1], *options)
    assert (result.code, result.err) == (0, "")
    sure = torch.sigmoid(2000 * (brightness - middle)) > 0.9
    want = model.decode(latents[sure].mean(0, keepdim=True)).detach()
    torch.testing.assert_close(drawn.pop()[0], want.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)
    result = gencore("arithmetic", trained / "toy", "--expression", names[2], *options)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert f"none of 300 samples is of class {names[2]!r}; -n takes more of them" in result.err


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("s1 +", "--expression: must be names with + and - between them, got 's1 +', without a name at 'its end'"),
        ("", "--expression: must be names"),
        ("s1 s2", "without a sign at 's2'"),
        ("t1", "--expression takes classes and samples such as s12, got 't1'; the classes are"),
        ("s9999999999", "got 's9999999999'"),
    ],
)
def test_what_is_no_expression_is_refused(gencore, trained, tmp_path, expression, message):
    result = gencore("arithmetic", trained / "toy", "--expression", expression, "--out", tmp_path / "a.png")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("command", ["arithmetic", "project"])
def test_latents_are_needed(gencore, trained, tmp_path, command):
    result = gencore(command, trained / "toy-sampler", "--out", tmp_path / "a.png")
    assert (result.code, result.err) == (2, "gencore: this model has no latent code\n")


@pytest.mark.parametrize("encoder", [True, False])
def test_images_are_projected(gencore, trained, tmp_path, monkeypatch, encoder):
    if not encoder:
        monkeypatch.delattr(sys.modules["gencore_toy"].Toy, "encode")
    options = ["-n", 3, "--steps", 40, "--candidates", 50, "--out", tmp_path / "a.png"]
    result = gencore("project", trained / "toy", *options)
    assert (result.code, result.err) == (0, "")
    assert "3 test images of bars projected" in result.out
    assert ("with the encoder's codes" if encoder else "with the best of 50 samples") in result.out
    found = np.load(tmp_path / "a.npz")
    assert (found["distances"] < found["start_distances"]).all()
    model = load(trained / "toy")
    images = model.decode(torch.from_numpy(found["latents"])).detach()
    targets = first_in_random_order(data.load("bars", "test"), 3, Key(0)).images
    torch.testing.assert_close((images - targets).square().flatten(1).mean(1), torch.from_numpy(found["distances"]))
    written = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.npz").read_bytes()
    gencore("project", trained / "toy", *options)
    assert written == ((tmp_path / "a.png").read_bytes(), (tmp_path / "a.npz").read_bytes())


def test_a_picture_is_projected(gencore, trained, tmp_path):
    Image.new("RGB", (40, 30), (200, 200, 200)).save(tmp_path / "gray.jpg")
    options = ["--steps", 5, "--out", tmp_path / "a.png"]
    result = gencore("project", trained / "toy", "--from", tmp_path / "gray.jpg", *options)
    assert (result.code, result.err) == (0, "")
    assert "a picture projected" in result.out
    assert np.load(tmp_path / "a.npz")["latents"].shape == (1, 3)
    for arguments, message in (
        (["--from", tmp_path / "none.png"], "--from: there is no file"),
        (["--from", tmp_path / "gray.jpg", "-n", 2], "is one picture, which -n"),
        (["-n", 41], "data set bars has 40 test images; 41 were requested"),
    ):
        result = gencore("project", trained / "toy", *arguments, *options)
        assert (result.code, len(result.err.splitlines())) == (2, 1)
        assert message in result.err
