"""gencore reconstruct, interpolate and traverse."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from gencore.cli.latents import spherical


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
    assert (result.code, result.err) == (2, "gencore: data set bars has only 40 test images, asked for are 41\n")


def test_spherical():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    path = spherical(a, b, 5)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path.norm(dim=1), torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0]))
    torch.testing.assert_close(path[2], torch.tensor([2.0, 2.0]) / 2**0.5)
    torch.testing.assert_close(spherical(a, 2 * a, 3), torch.stack((a, 1.5 * a, 2 * a)))
