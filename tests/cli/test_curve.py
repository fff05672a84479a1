"""gencore curve."""

from __future__ import annotations

import json

import pytest
from PIL import Image


def test_curve_of_sizes_goes_on_where_it_was_ended(gencore, tmp_path):
    settings = ("train.steps=300", "hidden_sizes=[64]", "optimizer.lr=0.005")
    options = ["--out", tmp_path, *(word for setting in settings for word in ("--set", setting))]
    result = gencore("curve", "--sizes", "8,2", *options)
    assert (result.code, result.err) == (0, "")
    found = json.loads((tmp_path / "curve.json").read_text())["models"]
    assert [list(sizes) for sizes in found.values()] == [["2", "8"], ["2", "8"]]
    for sizes in found.values():
        assert sizes["8"]["error"] < sizes["2"]["error"]
        assert sizes["2"]["images"] == sizes["8"]["images"]
    assert "mean squared error  2 values  8 values" in result.out
    assert f"autoencoder         {found['autoencoder']['2']['error']:.5f}" in result.out
    assert Image.open(tmp_path / "curve.png").width > 600
    run = tmp_path / "pca-2" / "run.json"
    before = run.stat().st_mtime_ns
    result = gencore("curve", "--sizes", "2,4,8", *options)
    assert result.code == 0
    again = json.loads((tmp_path / "curve.json").read_text())["models"]
    assert again["autoencoder"]["2"] == found["autoencoder"]["2"]
    assert list(again["pca"]) == ["2", "4", "8"]
    assert run.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "2,x"], "--sizes takes different numbers of at least 1 with commas between them, got '2,x'"),
        (["--sizes", "2,2"], "--sizes takes different numbers"),
        (["--models", "toy"], "--models: model toy has no setting latent_size"),
        (["--models", "gan", "--sizes", "2", "--set", "train.steps=1"], "--models: model gan has no encoder"),
        (["--set", "latent_size=3"], "--set latent_size: the sizes are those of --sizes"),
        (["--set", "wings=3"], "--set wings: is a setting of none of the models pca, autoencoder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(gencore, tmp_path, options, message):
    result = gencore("curve", "--out", tmp_path / "out", *options)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err
