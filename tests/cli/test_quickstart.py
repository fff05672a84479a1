"""gencore quickstart, with runs of a few steps."""

from __future__ import annotations

import torch
from PIL import Image

from gencore.bench import run
from gencore.cli import quickstart
from gencore.train import checkpoint


def test_everything_is_written_and_said(gencore, tmp_path, monkeypatch):
    recipes = {
        name: {**recipe, "train": {**recipe["train"], "steps": 4}} for name, recipe in quickstart._RECIPES.items()
    }
    monkeypatch.setattr(quickstart, "_RECIPES", recipes)
    monkeypatch.setattr(run, "QUICK", run.QUICK._replace(rounds=5, budget=0.1))
    result = gencore("quickstart", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    names = ("vae/samples", "vae/reconstructions", "vae/traversal", "gan/samples", "gan/traversal")
    for name in (*names, "ddpm/samples", "ddpm/edits", "losses"):
        path = tmp_path / "out" / f"{name}.png"
        assert Image.open(path).format == "PNG"
        assert str(path) in result.out
    assert "SIMD level" in result.out
    for told in (
        "reparameterize, forward and backward, 64x4x64x64",
        "group_norm, forward, ",
        "add_noise, forward, ",
        "diffusion_step, DDPM step, ",
        "Fréchet",
        "asked for each class",
        "on two cores",
        "training the classifier",
        "drawing samples of ddpm and measuring them",
        "timing 6 kernels",
    ):
        assert told in result.out
    assert gencore("sample", tmp_path / "out" / "vae", "-n", 4).code == 0
    # Its folder may be used again: what it trained is removed, the rest stays.
    quickstart._claim(tmp_path / "out")
    assert not (tmp_path / "out" / "vae").exists()
    assert (tmp_path / "out" / "losses.png").exists()


def test_the_averaged_weights_are_shown(toy_environment, tmp_path, monkeypatch):
    recipe = quickstart._RECIPES["vae"]
    monkeypatch.setitem(quickstart._RECIPES, "vae", {**recipe, "train": {**recipe["train"], "steps": 4}})
    shown = quickstart._trained("vae", tmp_path / "vae").model
    saved = checkpoint.read(tmp_path / "vae")
    for name, tensor in shown.state_dict().items():
        assert torch.equal(tensor, saved.tensors("ema")[name])
    assert not all(torch.equal(tensor, saved.tensors("model")[name]) for name, tensor in shown.state_dict().items())


def test_a_run_of_the_users_is_not_touched(gencore, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "run.json").write_text("{}")
    result = gencore("quickstart", "--out", tmp_path)
    assert result.code == 2
    assert "no quickstart made it; choose another folder with --out" in result.err
    assert (tmp_path / "vae" / "run.json").read_text() == "{}"
