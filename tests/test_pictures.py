"""Grids and curves."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import pictures


def test_images_stand_where_they_belong_and_are_enlarged():
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 1] = 1.0
    images[2] = 0.5
    pixels = np.asarray(pictures.grid(images, columns=2))
    side, gap, margin = 56, pictures._GAP, pictures._MARGIN
    assert pixels.shape == (2 * margin + 2 * side + gap,) * 2 + (3,)
    second = pixels[margin : margin + side, margin + side + gap : margin + 2 * side + gap, 0]
    # The corner of the bright pixel, the three dark ones, and a fall from one to the other.
    assert second[0, -1] > 245
    assert max(second[0, 0], second[-1, 0], second[-1, -1]) < 10
    assert (np.diff(second[0].astype(int)) >= -1).all()
    third = pixels[margin + side + gap : margin + 2 * side + gap, margin : margin + side]
    assert (third == 128).all()
    assert (pixels[margin + side + gap :, margin + side + gap :] == 255).all()


def test_colour_large_images_and_labels():
    images = torch.rand(4, 3, 100, 80)
    picture = pictures.grid(images, columns=2, row_labels=["one", "two"], rows_per_group=2)
    assert picture.width > 2 * 80 + 3 * pictures._GAP
    assert picture.height == 2 * pictures._MARGIN + 200 + pictures._GAP


def test_captions_stand_below_and_are_cut():
    images = torch.zeros(3, 1, 56, 56)
    plain = np.asarray(pictures.grid(images, columns=3))
    picture = np.asarray(pictures.grid(images, columns=3, captions=["a", "", "b"]))
    assert picture.shape[0] == plain.shape[0] + pictures._LINE
    assert picture.shape[1] == plain.shape[1]
    margin, gap = pictures._MARGIN, pictures._GAP
    below = picture[margin + 56 : -margin, :, 0].min(axis=0)
    ink = [bool((below[margin + i * (56 + gap) :][:56] < 128).any()) for i in range(3)]
    assert ink == [True, False, True]
    long = np.asarray(pictures.grid(images, columns=3, captions=["many long words " * 9] * 3))
    assert long.shape[0] == plain.shape[0] + pictures._LINES * pictures._LINE
    assert long.shape[1] == 2 * margin + 3 * pictures._CAPTION_WIDTH + 2 * gap
    # Each stays in its own place.
    assert (long[:, margin + pictures._CAPTION_WIDTH : margin + pictures._CAPTION_WIDTH + gap] == 255).all()
    assert [pictures._cut(text, 40) for text in ("word", "x" * 90, "")] == ["word", pictures._cut("x" * 50, 40), ""]
    with pytest.raises(ValueError, match="captions must be one for each of 3 images, got 1"):
        pictures.grid(images, captions=["a"])


def test_opacity_lies_before_white():
    for channels in (2, 4):
        images = torch.zeros(1, channels, 60, 60)
        images[:, -1] = 0.5
        pixels = np.asarray(pictures.grid(images, columns=1))
        assert abs(int(pixels[30, 30, 0]) - 127) <= 1
        assert (pixels[30, 30] == pixels[30, 30, 0]).all()


def test_many_channels_stand_side_by_side():
    images = torch.arange(5.0).reshape(1, 5, 1, 1).expand(1, 5, 60, 60) / 4
    picture = pictures.grid(images, columns=1)
    assert picture.width == 2 * pictures._MARGIN + 5 * 60
    middle = np.asarray(picture)[pictures._MARGIN + 30, pictures._MARGIN + 30 :: 60, 0][:5]
    assert middle.tolist() == [0, 64, 128, 191, 255]


def test_what_is_not_finite_is_refused():
    images = torch.rand(4, 3, 8, 8)
    images[1:3, 0, 0, 0] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(pictures.NotFiniteError, match="2 of 4 images are not finite, and no picture is written"):
        pictures.grid(images, columns=2)


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (1, 0, 2, 2), (1, 2, 2)])
def test_what_is_no_image_is_an_error(shape):
    with pytest.raises(ValueError, match="images must be"):
        pictures.grid(torch.zeros(shape), columns=2)


def test_loss_curves():
    records = [{"step": s, "g/loss": 1 / s, "d/loss": None if s == 2 else s} for s in range(1, 5)]
    picture = Image.open(io.BytesIO(pictures.loss_curves({"GAN": records, "VAE": []})))
    assert picture.format == "PNG"
    assert picture.width > picture.height
