"""gencore neighbours."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from gencore import data
from gencore.cli import image_sets, neighbours


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GENCORE_CACHE", str(tmp_path / "cache"))


def test_a_picture_and_distances(gencore, trained, tmp_path):
    out = tmp_path / "n.png"
    result = gencore("neighbours", trained / "toy", "-n", 5, "--features", "classifier", "--out", out)
    assert (result.code, result.err) == (0, "")
    assert Image.open(out).width > 5 * 56
    lines = result.out.splitlines()
    assert "samples and the training images nearest to them" in lines[0]
    assert ["pixels" in lines[1], "features (classifier)" in lines[2]] == [True, True]
    first = out.read_bytes()
    gencore("neighbours", trained / "toy", "-n", 5, "--features", "classifier", "--out", out)
    assert out.read_bytes() == first


def test_a_copy_is_found(gencore, trained, tmp_path, monkeypatch):
    train = data.load("bars", "train")

    def copies(model, draw):
        return train.batch(torch.arange(3, 3 + draw.n)).images

    monkeypatch.setattr(sys.modules["gencore_toy"].ToySampler, "generate", copies)
    found = []
    real = neighbours.found
    monkeypatch.setattr(neighbours, "found", lambda *arguments: found.append(real(*arguments)) or found[-1])
    result = gencore(
        "neighbours", trained / "toy-sampler", "-n", 4, "--features", "classifier", "--out", tmp_path / "n.png"
    )
    assert result.code == 0
    for near in found[0]:
        images = train.batch(near.indices[:, 0]).images
        assert torch.equal(images, train.batch(torch.arange(3, 7)).images)
        assert near.distances.max() < 1e-4
    assert "median: 0" in result.out


def test_refuses(gencore, trained, tmp_path, monkeypatch):
    def broken(model, draw):
        return torch.full((draw.n, 1, 4, 4), float("nan"))

    monkeypatch.setattr(sys.modules["gencore_toy"].ToySampler, "generate", broken)
    options = ("-n", 2, "--features", "classifier", "--out", tmp_path / "n.png")
    result = gencore("neighbours", trained / "toy-sampler", *options)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "2 of 2 samples are not finite" in result.err
    assert not (tmp_path / "n.png").exists()


def test_all_images_are_gone_through_in_order():
    digits = data.load("digits", "test")
    found = image_sets.of_dataset(digits, None, 0)
    assert torch.equal(torch.cat(list(found.batches())), digits.batch(torch.arange(len(digits))).images)
    some = [image_sets.of_dataset(digits, 50, seed) for seed in (0, 0, 1)]
    assert [each.count for each in some] == [50] * 3
    assert some[0].fingerprint == some[1].fingerprint != some[2].fingerprint
    assert len({each.fingerprint for each in (found, *some)}) == 3
