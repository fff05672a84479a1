"""The Python of README and of pages of docs/ runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def snippet(page: str, word: str) -> str:
    """The one block of Python in the page that holds the word."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S) if word in code]
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_a_model_is_trained_loaded_and_sampled(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    code = snippet(page, "from gencore.train import")
    shorter = code.replace("steps=500", "steps=5")
    assert shorter != code
    names: dict = {}
    exec(shorter, names)
    assert names["images"].shape == (16, 1, 8, 8)
    assert Image.open("samples.png").width > 200
    assert (tmp_path / "runs" / "vae" / "run.json").exists()


def test_a_gan_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = snippet("docs/gan.md", "from gencore.train import")
    shorter = code.replace("steps=500", "steps=3")
    assert shorter != code
    names: dict = {}
    exec(shorter, names)
    assert names["images"].shape == (64, 1, 8, 8)


def test_a_data_set_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(20):
        Image.new("RGB", (70 + i, 80), (10 * i, 0, 0)).save(f"photos/{i}.png")
    names: dict = {}
    exec(snippet("docs/data.md", "data.load("), names)
    assert names["batch"].images.shape == (16, 3, 64, 64)
    assert "torch.Size([16, 3, 64, 64])" in capsys.readouterr().out
    assert torch.isfinite(names["batch"].images).all()


def test_layers_of_gans_fit_together():
    names: dict = {}
    exec(snippet("docs/gan_layers.md", "ModulatedConv2d("), names)
    assert names["images"].shape == (4, 16, 16, 16)
    assert names["logits"].shape == (4, 1)
    exec(snippet("docs/gan_layers.md", "sigma_free"), names)
    assert not torch.equal(names["weight"], names["sigma_free"])


def test_latents_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet("docs/latents.md", "latents.project(").replace("steps=500", "steps=5"), names)
    assert names["path"].shape[0] == 8
    assert (names["found"].distances <= names["found"].start_distances).all()
