"""gencore probe and map."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from PIL import Image

from gencore.data import DatasetPlugin, ImageDataset


def test_a_map_is_drawn_the_same_each_time(gencore, trained, tmp_path):
    result = gencore("map", trained / "toy")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{trained / 'toy' / 'map.png'}: codes of 40 images, toy on bars")
    assert Image.open(trained / "toy" / "map.png").width > 1000
    gencore("map", trained / "toy", "--out", tmp_path / "again.png", "--batch-size", 7)
    assert (tmp_path / "again.png").read_bytes() == (trained / "toy" / "map.png").read_bytes()


def test_probe_tells_codes_components_and_pixels_apart(gencore, trained):
    result = gencore("probe", trained / "toy", "-n", 30)
    assert (result.code, result.err) == (0, "")
    rows = [tuple(re.split("  +", line)) for line in result.out.splitlines()[1:]]
    names, sizes, accuracies = zip(*rows, strict=True)
    assert names == ("codes of toy on bars, step 30", "principal components", "pixels")
    assert sizes == ("3", "3", "16")
    # Bars are told by their pixels without a fault.
    assert accuracies[2] == "1.000"


@pytest.mark.parametrize("command", ["map", "probe"])
def test_a_model_without_an_encoder_is_refused(gencore, trained, command):
    result = gencore(command, trained / "toy-sampler")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "this model has no encoder" in result.err


def test_images_without_classes_are_drawn_and_not_probed(gencore, trained, tmp_path, monkeypatch):
    plain = ImageDataset("plain", "test", torch.arange(9 * 16).reshape(9, 1, 4, 4).to(torch.uint8))
    monkeypatch.setattr(sys.modules["gencore_toy"], "bars", DatasetPlugin("bars", lambda path, split: plain))
    result = gencore("map", trained / "toy", "--out", tmp_path / "a.png")
    assert (result.code, result.err) == (0, "")
    result = gencore("probe", trained / "toy")
    assert (result.code, result.err) == (
        2,
        "gencore: data set plain has no classes, which the classifiers are to tell\n",
    )
