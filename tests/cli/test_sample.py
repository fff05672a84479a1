"""gencore sample."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import Key, train
from gencore.metrics import draw_samples


def test_a_grid_is_written(gencore, trained, tmp_path):
    result = gencore("sample", trained / "toy", "-n", 9, "--out", tmp_path / "new" / "grid.png")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{tmp_path / 'new' / 'grid.png'}: 9 samples of toy on bars, step 30\n"
    picture = Image.open(tmp_path / "new" / "grid.png")
    assert picture.format == "PNG"
    assert picture.width == picture.height


def test_the_batch_size_changes_nothing(gencore, trained, tmp_path):
    pixels = []
    for batch_size in (1, 7, 256):
        out = tmp_path / f"{batch_size}.png"
        assert gencore("sample", trained / "toy", "-n", 20, "--batch-size", batch_size, "--out", out).code == 0
        pixels.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(pixels[0] - pixels[2]).max() <= 1
    assert np.abs(pixels[1] - pixels[2]).max() <= 1
    model = train.load_model(trained / "toy")
    whole = draw_samples(model, Key(0), n=20, batch_size=20)
    for batch_size in (1, 3, 19):
        torch.testing.assert_close(
            draw_samples(model, Key(0), n=20, batch_size=batch_size), whole, rtol=1e-5, atol=1e-6
        )


def test_the_batch_size_changes_no_labels(gencore, trained, tmp_path):
    for batch_size in (3, 256):
        out = tmp_path / f"{batch_size}.png"
        options = ("-n", 20, "--labels", "0,7", "--batch-size", batch_size, "--out", out)
        assert gencore("sample", trained / "toy-sampler", *options).code == 0
    assert (tmp_path / "3.png").read_bytes() == (tmp_path / "256.png").read_bytes()


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_the_batch_size_changes_nothing_of_the_real_models(gencore, tmp_path, name):
    options = ("--data", "digits", "--steps", 3, "--batch-size", 16)
    assert gencore("train", name, *options, "--out", tmp_path / "run").code == 0
    model = train.load_model(tmp_path / "run")
    whole = draw_samples(model, Key(0), n=20, batch_size=20)
    assert len(whole.unique(dim=0)) == 20
    for batch_size in (1, 3, 19):
        torch.testing.assert_close(
            draw_samples(model, Key(0), n=20, batch_size=batch_size), whole, rtol=1e-5, atol=1e-6
        )


def test_the_seed_decides(gencore, trained, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        gencore("sample", trained / "toy", "-n", 4, "--seed", seed, "--out", tmp_path / name)
    content = {name: (tmp_path / name).read_bytes() for name in "abc"}
    assert content["a"] == content["b"] != content["c"]


def test_a_checkpoint_and_the_weights_can_be_chosen(gencore, trained, tmp_path):
    folder = trained / "toy" / "checkpoints" / "step-00000030"
    for name, options in (("ema", ()), ("also", ("--ema",)), ("raw", ("--no-ema",))):
        assert gencore("sample", folder, "-n", 4, "--out", tmp_path / name, *options).code == 0
    content = {name: (tmp_path / name).read_bytes() for name in ("ema", "also", "raw")}
    assert content["ema"] == content["also"] != content["raw"]


def test_pictures_outlive_the_checkpoint_they_are_of(gencore, tmp_path, monkeypatch):
    gencore("train", "toy", "--data", "bars", "--steps", 1, "--out", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    files = set(folder.iterdir())
    for command, file in (("sample", "samples.png"), ("traverse", "traversal.png")):
        assert gencore(command, folder).code == 0
        assert (tmp_path / "run" / file).is_file()
    (tmp_path / "run" / "samples.png").unlink()
    monkeypatch.chdir(folder)
    assert gencore("sample", ".").code == 0
    assert (tmp_path / "run" / "samples.png").is_file()
    assert set(folder.iterdir()) == files


def test_labels(gencore, trained, tmp_path):
    assert gencore("sample", trained / "toy-sampler", "--labels", "0,7", "--out", tmp_path / "a").code == 0
    assert gencore("sample", trained / "toy-sampler", "--out", tmp_path / "b").code == 0
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
    for labels, message in (("8", "from 0 to 7"), ("a,b", "takes classes such as 0,1,2")):
        result = gencore("sample", trained / "toy-sampler", "--labels", labels)
        assert (result.code, message in result.err) == (2, True)


def test_labels_for_a_model_without_classes_are_one_line(gencore, tmp_path):
    options = ("--data", "digits", "--steps", 1, "--batch-size", 8, "--set", "hidden_sizes=8")
    assert gencore("train", "vae", *options, "--out", tmp_path / "run").code == 0
    result = gencore("sample", tmp_path / "run", "--labels", "0,1")
    assert (result.code, result.err) == (2, "gencore: --labels: model vae samples without classes\n")


def test_no_picture_is_made_of_what_is_not_finite(gencore, trained, tmp_path, monkeypatch):
    toy = sys.modules["gencore_toy"].Toy

    def broken(model, n, key, labels=None, real=toy.sample):
        images = real(model, n, key, labels)
        images[1] = math.nan
        return images

    monkeypatch.setattr(toy, "sample", broken)
    result = gencore("sample", trained / "toy", "-n", 4, "--out", tmp_path / "a.png")
    message = "gencore: 1 of 4 samples are not finite, and no picture is written\n"
    assert (result.code, result.err) == (2, message)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "there is no folder nowhere"),
        ((".",), "holds no run"),
        (("RUN", "-n", 0), "Invalid value for '-n'"),
        (("RUN", "--seed", -1), "Invalid value for '--seed'"),
        (("RUN", "--out", "RUN"), "Is a directory"),
        (("RUN", "--out", ""), "Invalid value for '--out': must not be empty"),
        (("RUN", "--out", "x.jpg"), "pictures are written as PNG, got a name in .jpg"),
        (("",), "must not be empty"),
    ],
)
def test_mistakes_are_one_line(gencore, trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = gencore("sample", *(trained / "toy" if argument == "RUN" else argument for argument in arguments))
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err


def test_a_damaged_checkpoint_is_one_line(gencore, tmp_path):
    gencore("train", "toy", "--data", "bars", "--steps", 1, "--out", tmp_path / "run")
    path = next((tmp_path / "run").rglob("model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    result = gencore("sample", tmp_path / "run")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "model.safetensors is damaged" in result.err
