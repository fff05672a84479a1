"""gencore quickstart, with runs of a few steps."""

from __future__ import annotations

from PIL import Image

from gencore.cli import quickstart


def test_everything_is_written_and_said(gencore, tmp_path, monkeypatch):
    recipes = {name: (model, {**train, "steps": 4}) for name, (model, train) in quickstart._RECIPES.items()}
    monkeypatch.setattr(quickstart, "_RECIPES", recipes)
    interleave = quickstart.interleave
    monkeypatch.setattr(quickstart, "interleave", lambda candidates: interleave(candidates, rounds=3))
    for _ in range(2):  # its folder may be used again
        result = gencore("quickstart", "--out", tmp_path / "out")
        assert result.code == 0, result.err
    for name in ("vae/samples", "vae/reconstructions", "vae/traversal", "gan/samples", "gan/traversal", "losses"):
        path = tmp_path / "out" / f"{name}.png"
        assert Image.open(path).format == "PNG"
        assert str(path) in result.out
    assert "SIMD level" in result.out
    assert "ops.reparameterize" in result.out
    assert gencore("sample", tmp_path / "out" / "vae", "-n", 4).code == 0


def test_a_run_of_the_users_is_not_touched(gencore, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "run.json").write_text("{}")
    result = gencore("quickstart", "--out", tmp_path)
    assert result.code == 2
    assert "no quickstart made it; choose another folder with --out" in result.err
    assert (tmp_path / "vae" / "run.json").read_text() == "{}"
