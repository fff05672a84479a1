"""gencore reconstruct, interpolate and traverse."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from gencore.cli.latents import spherical
from gencore.data import DatasetPlugin, ImageDataset


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
    for command, said in (("reconstruct", ""), ("interpolate", "1 interpolations"), ("traverse", "")):
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


def test_spherical():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    path = spherical(a, b, 5)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path.norm(dim=1), torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0]))
    torch.testing.assert_close(path[2], torch.tensor([2.0, 2.0]) / 2**0.5)
    torch.testing.assert_close(spherical(a, 2 * a, 3), torch.stack((a, 1.5 * a, 2 * a)))
