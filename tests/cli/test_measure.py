"""gencore measure."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import Key, data, metrics
from gencore.metrics import cache


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GENCORE_CACHE", str(tmp_path / "cache"))


def one_line(result):
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    return result.err


@pytest.fixture
def folder(tmp_path):
    """40 gray images of 4x4."""
    place = tmp_path / "folder"
    place.mkdir()
    bars = data.load("bars", "test")
    for i, image in enumerate(bars.batch(torch.arange(40)).images):
        Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(place / f"{i:02d}.png")
    return place


def test_a_run_against_a_data_set(gencore, trained, tmp_path):
    out = tmp_path / "m.json"
    options = ("--features", "classifier", "-n", 60, "--replicates", 3, "--out", out)
    result = gencore("measure", "bars", trained / "toy", *options)
    assert result.code == 0
    # 40 test images and 60 samples are too few for the classifier's 256 features.
    (note,) = result.err.splitlines()
    assert "a covariance of 256 features needs more than 256 images, and bars test has 40 images and" in note
    told = json.loads(out.read_text())
    assert (told["features"], told["real_images"], told["images"]) == ("classifier", 40, 60)
    assert told["compared"] == "60 of bars train"
    figures = {each["measure"]: each for each in told["figures"]}
    assert list(figures) == ["frechet", "kernel", "precision", "recall", "density", "coverage", "score"]
    # Training images are nearer to test images than what a model of 30 steps makes.
    assert 0 < figures["frechet"]["real"] < figures["frechet"]["value"]
    assert figures["frechet"]["interval"][0] < figures["frechet"]["value"] < figures["frechet"]["interval"][1]
    assert f"{figures['frechet']['value']:.4g}" in result.out
    assert "FD (classifier)" in result.out
    again = gencore("measure", "bars", trained / "toy", *options)
    assert (again.code, json.loads(out.read_text())) == (0, told)


def test_the_figures_are_those_of_the_features(gencore, folder, tmp_path):
    """Folders and an npz file, half of the images against the others where there is no other split."""
    images = data.load("bars", "train").batch(torch.arange(30)).images
    np.savez(tmp_path / "fake.npz", arr_0=(images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

    class Pixels:
        name, size, fingerprint = "pixels", 16, "1"

        def __call__(self, images):
            return images.flatten(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gencore.cli.image_sets.extractor_of", lambda *arguments: Pixels())
        result = gencore("measure", folder, tmp_path / "fake.npz", "--replicates", 0, "--out", tmp_path / "m.json")
        assert (result.code, result.err) == (0, "")
    told = json.loads((tmp_path / "m.json").read_text())
    assert (told["real_images"], told["images"], told["compared"]) == (40, 30, "20 of REAL against its others")
    real = data.load("bars", "test").batch(torch.arange(40)).images.flatten(1)
    expected = metrics.compare(Pixels(), real, images.flatten(1), replicates=0, key=Key(0))
    assert [each["value"] for each in told["figures"]] == pytest.approx([each.estimate.value for each in expected])
    assert all(each["real"] is not None for each in told["figures"])
    assert {each["standard_error"] for each in told["figures"][:2]} == {None}


def test_features_of_real_images_are_kept(gencore, folder, tmp_path, monkeypatch):
    seen = []

    class Pixels:
        name, size, fingerprint = "pixels", 16, "1"

        def __call__(self, images):
            seen.append(len(images))
            return images.flatten(1)

    monkeypatch.setattr("gencore.cli.image_sets.extractor_of", lambda *arguments: Pixels())
    outs = []
    for options, counts in (((), [40, 40]), ((), [40]), (("--limit", 30), [30, 40]), (("--no-cache",), [40, 40])):
        seen.clear()
        result = gencore("measure", folder, folder, *options)
        assert result.code == 0
        # Folders are read as two splits.
        assert [sum(seen[:-2]), sum(seen[-2:])] == [sum(counts[:-1]), counts[-1]]
        outs.append(result.out)
    assert outs[0] == outs[1] == outs[3] != outs[2]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert cache.folder() == tmp_path / "cache"


def test_conditions_that_a_model_needs_are_those_of_test_images(gencore, conditioned, monkeypatch):
    judge = metrics.train_classifier(data.load("bars", "train"), data.load("bars", "test"), seed=0)
    monkeypatch.setattr(metrics, "train_classifier", lambda *arguments, **options: judge)
    result = gencore("measure", "bars", conditioned / "toy-translator", "--features", "classifier", "-n", 20)
    assert (result.code, "toy-translator (20 images) against bars test (40 images)" in result.out) == (0, True)


def test_bad_input_is_one_line(gencore, trained, folder, tmp_path, monkeypatch):
    line = one_line(gencore("measure", folder, tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'} is not there; data sets are" in line
    (tmp_path / "text.txt").write_text("x")
    assert "is no run, folder or archive of images" in one_line(gencore("measure", folder, tmp_path / "text.txt"))
    line = one_line(gencore("measure", "digits", trained / "toy"))
    assert "digits test has images of 1x8x8" in line
    assert "they must be of one size (--set data.size=N resizes those of folders)" in line
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 4, 4, 1), np.uint8))
    line = one_line(gencore("measure", folder, tmp_path / "a.npz"))
    assert line == f"gencore: {tmp_path / 'a.npz'} has 5 images; these measures need at least 6\n"
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((9, 4, 4, 1), np.float32))
    assert "arr_0 must be uint8 of shape (N, H, W, C)" in one_line(gencore("measure", folder, tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", other=np.zeros(3))
    assert "must hold the images as arr_0" in one_line(gencore("measure", folder, tmp_path / "c.npz"))
    np.savez(tmp_path / "d.npz", arr_0=np.array([{}], dtype=object))
    assert "cannot be read as an npz file" in one_line(gencore("measure", folder, tmp_path / "d.npz"))
    line = one_line(gencore("measure", folder, folder, "--features", "classifier"))
    assert "--features classifier needs real images with classes, and both of their splits" in line
    line = one_line(gencore("measure", folder, folder, "--features", "efficientnet", "--weights", tmp_path / "w.pth"))
    assert f"cannot read the weights of EfficientNet-Lite0: {tmp_path / 'w.pth'}: No such file" in line
    line = one_line(gencore("measure", "bars", folder, "--features", "classifier", "--weights", tmp_path / "w.pth"))
    assert "--weights: the classifier is trained on the images" in line

    def broken(model, draw):
        return torch.full((draw.n, 1, 4, 4), float("nan"))

    monkeypatch.setattr(sys.modules["gencore_toy"].ToySampler, "generate", broken)
    line = one_line(gencore("measure", "bars", trained / "toy-sampler", "--features", "classifier", "-n", 9))
    assert "toy-sampler: images must be finite, but 9 of 9 hold NaN or infinity" in line
