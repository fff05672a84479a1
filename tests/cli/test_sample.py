"""gencore sample."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import Key, data, train
from gencore.cli import common
from gencore.data import DatasetPlugin, ImageDataset, MissingSplitError
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
    model = train.load(trained / "toy")
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
    model = train.load(tmp_path / "run")
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
    assert gencore("sample", trained / "toy-sampler", "--labels", "bar0, bar7", "--out", tmp_path / "c").code == 0
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    for labels, message in (
        ("8", "numbers from 0 to 7, got '8'; the classes are 'bar0', 'bar1',"),
        ("9" * 5000, "numbers from 0 to 7, got '99"),
        ("bar7,Bar9", "got 'Bar9'; did you mean 'bar"),
        ("-1", "got '-1'"),
        ("1,", "got ''"),
    ):
        result = gencore("sample", trained / "toy-sampler", "--labels", labels)
        assert (result.code, message in result.err) == (2, True)


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        (["a", "b,c", " d", "b"], "a,b,c, d,b,0", [0, 1, 2, 3, 0]),
        (["1", "2", "10"], "10,1,2", [2, 0, 1]),
        (["cat", "dog"], "dog, 0", [1, 0]),
    ],
)
def test_names_of_classes(names, text, expected):
    assert common._classes_of(text, names) == expected


def test_numbers_are_names_where_a_class_is_called_by_one():
    with pytest.raises(common.UserError, match="takes names of classes, got '0'; the classes are '1', '2'"):
        common._classes_of("0", ["1", "2"])


def test_an_empty_folder_keeps_its_place(gencore, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path.stat().st_ino
    assert gencore("sample", trained / "toy", "-n", 2, "--format", "png", "--out", ".").code == 0
    assert (sorted(os.listdir(".")), tmp_path.stat().st_ino) == (["000000.png", "000001.png"], place)


def test_labels_for_a_model_without_classes_are_one_line(gencore, tmp_path):
    options = ("--data", "digits", "--steps", 1, "--batch-size", 8, "--set", "hidden_sizes=8")
    assert gencore("train", "vae", *options, "--out", tmp_path / "run").code == 0
    result = gencore("sample", tmp_path / "run", "--labels", "0,1")
    assert (result.code, result.err) == (2, "gencore: --labels: model vae samples without classes\n")


def test_no_picture_is_made_of_what_is_not_finite(gencore, trained, tmp_path, monkeypatch):
    toy = sys.modules["gencore_toy"].Toy

    def broken(model, draw, real=toy.generate):
        images = real(model, draw)
        images[1] = math.nan
        return images

    monkeypatch.setattr(toy, "generate", broken)
    result = gencore("sample", trained / "toy", "-n", 4, "--out", tmp_path / "a.png")
    message = "gencore: 1 of 4 samples are not finite, and no picture is written\n"
    assert (result.code, result.err) == (2, message)
    assert not (tmp_path / "a.png").exists()


def test_single_files_and_one_array_hold_the_same_images(gencore, trained, tmp_path):
    model, labels = train.load(trained / "toy-sampler"), torch.arange(20) % 8
    expected = (draw_samples(model, Key(3), n=20, conditions={"label": labels}) * 255).round().to(torch.uint8).numpy()
    options = ("-n", 20, "--seed", 3, "--labels", "0,1,2,3,4,5,6,7", "--batch-size", 6)
    files, array = tmp_path / "new" / "files", tmp_path / "array.npz"
    result = gencore("sample", trained / "toy-sampler", *options, "--format", "png", "--out", files)
    assert (result.code, result.out) == (0, f"{files}: 20 samples of toy-sampler on bars, step 30\n")
    assert gencore("sample", trained / "toy-sampler", *options, "--format", "npz", "--out", array).code == 0
    assert sorted(path.name for path in files.iterdir()) == [f"{i:06}.png" for i in range(20)]
    assert os.listdir(files.parent) == ["files"]
    for i in range(20):
        picture = Image.open(files / f"{i:06}.png")
        assert (picture.mode, np.asarray(picture).tolist()) == ("L", expected[i, 0].tolist())
    with np.load(array) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], expected.transpose(0, 2, 3, 1))
        assert np.array_equal(arrays["arr_1"], labels.numpy())
    result = gencore("sample", trained / "toy-sampler", "-n", 1, "--format", "png", "--out", files)
    assert (result.code, result.err) == (2, f"gencore: folder {files} is not empty; choose another one with --out\n")
    assert gencore("sample", trained / "toy", "-n", 3, "--format", "npz", "--out", array).code == 0
    with np.load(array) as arrays:
        assert (arrays.files, arrays["arr_0"].shape) == (["arr_0"], (3, 4, 4, 1))


@pytest.mark.parametrize("form", ["png", "npz"])
def test_what_fails_half_way_leaves_nothing(gencore, trained, tmp_path, monkeypatch, form):
    toy = sys.modules["gencore_toy"].Toy

    def broken(model, draw, real=toy.generate):
        images = real(model, draw)
        return images * math.nan if draw.n == 1 else images

    monkeypatch.setattr(toy, "generate", broken)
    out = tmp_path / f"out{'.npz' if form == 'npz' else ''}"
    result = gencore("sample", trained / "toy", "-n", 9, "--batch-size", 4, "--format", form, "--out", out)
    assert (result.code, result.err) == (2, "gencore: 1 of 1 samples are not finite, and no picture is written\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_any_number_of_channels_are_drawn(gencore, tmp_path, monkeypatch, channels):
    pixels = torch.arange(12 * channels * 16).remainder(256).reshape(12, channels, 4, 4).byte()
    spectra = DatasetPlugin("bars", lambda path, split: ImageDataset("spectra", split, pixels))
    monkeypatch.setattr(sys.modules["gencore_toy"], "bars", spectra)
    assert gencore("train", "toy", "--data", "bars", "--steps", 1, "--out", tmp_path / "run").code == 0
    for command in ("sample", "reconstruct", "interpolate", "traverse"):
        result = gencore(command, tmp_path / "run")
        assert (result.code, result.err) == (0, ""), command
    result = gencore("sample", tmp_path / "run", "-n", 2, "--format", "png", "--out", tmp_path / "files")
    if channels > 4:
        assert (result.code, "--format png takes images of 1 to 4 channels" in result.err) == (2, True)
    else:
        assert Image.open(tmp_path / "files" / "000001.png").mode == {2: "LA", 4: "RGBA"}[channels]
    assert gencore("sample", tmp_path / "run", "-n", 2, "--format", "npz").code == 0
    assert np.load(tmp_path / "run" / "samples.npz")["arr_0"].shape == (2, 4, 4, channels)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: torch.zeros(n + 1, 1, 4, 4), r"it must return images of shape (3, 1, 4, 4), got (4, 1, 4, 4)"),
        (lambda n: torch.zeros(n, 4, 4), r"it must return images of shape (3, 1, 4, 4), got (3, 4, 4)"),
        (lambda n: torch.zeros(n, 1, 4, 4, dtype=torch.uint8), "of a floating dtype, got torch.uint8"),
        (lambda n: None, "it must return a dense tensor, got NoneType"),
        (lambda n: torch.zeros(n, 1, 4, 4).to_sparse(), "it must return a dense tensor, got one of another layout"),
        (lambda n: torch.zeros(n, 1, 4, 4, device="meta"), "NotImplementedError"),
        (lambda n: sys.exit(3), "SystemExit: 3"),
        (lambda n: {}["x"], "KeyError: 'x'"),
    ],
)
def test_a_wrong_sample_names_the_plugin(gencore, trained, tmp_path, monkeypatch, returned, message):
    monkeypatch.setattr(sys.modules["gencore_toy"].Toy, "generate", lambda model, draw: returned(draw.n))
    result = gencore("sample", trained / "toy", "-n", 3, "--out", tmp_path / "a.png")
    said = (
        "gencore: model plugin 'toy' (gencore_toy:toy) of package gencore-toy 1.0 is broken: sample() of samples 0 to 2"
    )
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith(said)
    assert message in result.err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "there is no folder nowhere"),
        ((".",), "holds no run"),
        (("RUN", "-n", 0), "Invalid value for '-n'"),
        (("RUN", "--seed", -1), "Invalid value for '--seed'"),
        (("RUN", "--out", "RUN"), "Is a directory; choose another place with --out"),
        (("RUN", "--format", "npz", "--out", "RUN"), "Is a directory; choose another place with --out"),
        (("RUN", "--out", __file__ + "/x.png"), "Not a directory; choose another place with --out"),
        (("RUN", "--format", "png", "--out", __file__), "is no folder; choose one with --out"),
        (("RUN", "--set", "data.size=3"), "--set data.NAME: sample reads a data set with --from only"),
        (("RUN", "--out", ""), "Invalid value for '--out': must not be empty"),
        (("RUN", "--out", "x.jpg"), "--out must end in .png with --format grid, got a name in .jpg"),
        (("RUN", "--out", "x.png", "--format", "npz"), "--out must end in .npz with --format npz"),
        (("RUN", "-n", 5000), "-n must be at most 4096 for a grid, got 5000; --format png or npz takes any number"),
        (("RUN", "--format", "jpeg"), "Invalid value for '--format'"),
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


def arrays_of(gencore, run, tmp_path, *options):
    """The images of ``gencore sample`` as an array, and its labels, if any."""
    out = tmp_path / "array.npz"
    result = gencore("sample", run, "--format", "npz", "--out", out, *options)
    assert (result.code, result.err) == (0, "")
    with np.load(out) as arrays:
        return arrays["arr_0"], arrays.get("arr_1")


def expected_of(run, n, **conditions):
    images = draw_samples(train.load(run), Key(0), n=n, conditions=conditions)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_texts_are_taken_in_turns_from_options_and_a_file(gencore, conditioned, tmp_path):
    run, file = conditioned / "toy-captions", tmp_path / "prompts.txt"
    file.write_text("row 1\n\n  Größe, 2 \r\n", encoding="utf-8")
    for options, texts in (
        (("--prompt", "row 1"), ["row 1"]),
        (("--prompt", "row 1", "--prompt", "a, b"), ["row 1", "a, b"]),
        (("--prompts", file), ["row 1", "Größe, 2"]),
        (("--prompts", file, "--prompt", ""), ["", "row 1", "Größe, 2"]),
    ):
        images, labels = arrays_of(gencore, run, tmp_path, "-n", 5, "--batch-size", 2, *options)
        expected = expected_of(run, 5, text=[texts[i % len(texts)] for i in range(5)])
        assert np.abs(images.astype(int) - expected).max() <= 1
        assert labels is None
    # Texts are heard: of two, the same noise makes other images.
    one, other = (arrays_of(gencore, run, tmp_path, "-n", 1, "--prompt", text)[0] for text in ("row 1", "column 3"))
    assert np.abs(one.astype(int) - other).max() > 20


def test_conditions_are_those_of_test_images(gencore, conditioned, trained, tmp_path):
    pairs, texts = (data.load(name, "test") for name in ("toy-pairs", "toy-texts"))
    first = torch.arange(44) % 40
    for run, name, conditions in (
        (conditioned / "toy-translator", "toy-pairs", {"source": pairs.batch(first).conditions["source"]}),
        (conditioned / "toy-captions", "toy-texts", {"text": texts.batch(first).conditions["text"]}),
        (trained / "toy-sampler", "bars", {"label": first % 8}),
    ):
        images, labels = arrays_of(gencore, run, tmp_path, "-n", 44, "--batch-size", 9, "--from", name)
        assert np.abs(images.astype(int) - expected_of(run, 44, **conditions)).max() <= 1
        assert (labels is not None) == ("label" in conditions)
    assert np.array_equal(labels, first % 8)
    # An option goes before what the images have.
    _, labels = arrays_of(gencore, trained / "toy-sampler", tmp_path, "-n", 3, "--from", "bars", "--labels", 5)
    assert labels.tolist() == [5, 5, 5]


def test_what_a_model_makes_depends_on_its_source(gencore, conditioned, tmp_path):
    images, _ = arrays_of(gencore, conditioned / "toy-translator", tmp_path, "-n", 8, "--from", "toy-pairs")
    test = data.load("toy-pairs", "test").batch(torch.arange(8)).images[:, 0].numpy()
    # It has learned to turn the negative back: the bright bar is where it was.
    assert images[..., 0][test > 0.5].mean() > 2 * images[..., 0][test < 0.5].mean()


def test_training_images_stand_in_for_test_images(gencore, conditioned, tmp_path, monkeypatch):
    toy = sys.modules["gencore_toy"]

    def load(path, split):
        if split == "test":
            raise MissingSplitError("toy-pairs has no test images")
        return toy.load_pairs(path, split)

    monkeypatch.setattr(toy, "toy_pairs", DatasetPlugin("toy-pairs", load))
    result = gencore("sample", conditioned / "toy-translator", "--from", "toy-pairs", "--out", tmp_path / "a.png")
    assert (result.code, result.err) == (0, "gencore: toy-pairs has no test images; training images are shown\n")


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("toy-captions", (), "model toy-captions needs text to sample: give --prompt"),
        ("toy-translator", (), "model toy-translator needs source to sample: give --from DATA"),
        ("toy-captions", ("--labels", 1), "--labels: model toy-captions samples without classes"),
        ("toy-translator", ("--prompt", "a"), "--prompt: model toy-translator samples without texts"),
        ("toy-translator", ("--from", "bars"), "--from: data set bars has no source"),
        ("toy-captions", ("--from", "toy-pairs"), "--from: data set toy-pairs has no text"),
        (
            "toy-translator",
            ("--from", "digits"),
            "the model makes images of 1x4x4, data set digits has images of 1x8x8",
        ),
        ("toy-translator", ("--from", "pairs"), "data set pairs needs a path: pairs:PATH"),
        (
            "toy-translator",
            ("--from", "toy-pairs", "--set", "data.size=3"),
            "data.size: is not a setting; data set toy",
        ),
        ("toy-captions", ("--prompts", "nowhere"), "nowhere: No such file or directory"),
        ("toy-captions", ("--prompts", "."), "Is a directory"),
        ("toy-captions", ("--prompts", "EMPTY"), "holds no line of text"),
        ("toy-captions", ("--prompts", "BYTES"), "must be text in UTF-8"),
        ("toy-sampler", ("--prompt", "a"), "--prompt: model toy-sampler samples without texts"),
        ("toy", ("--from", "bars"), "--from: model toy samples without conditions"),
        ("toy", ("--labels", 0), "--labels: model toy samples without classes"),
    ],
)
def test_mistakes_in_conditions_are_one_line(
    gencore, trained, conditioned, tmp_path, monkeypatch, run, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe")
    folder = (trained if run in ("toy", "toy-sampler") else conditioned) / run
    result = gencore("sample", folder, *options, "--out", "a.png")
    assert (result.code, len(result.err.splitlines())) == (2, 1), result.err
    assert message in result.err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": torch.zeros(40, 3, 4, 4, dtype=torch.uint8)}, "its source has another shape"),
        ({"source": ["a"] * 40}, "its source is of another kind, text,"),
    ],
)
def test_conditions_of_another_kind_are_refused(gencore, conditioned, tmp_path, monkeypatch, changed, message):
    """As what they are: a mistake of who gives the data set, not of the model."""
    images = torch.zeros(40, 1, 4, 4, dtype=torch.uint8)
    other = DatasetPlugin("bars", lambda path, split: ImageDataset("bars", split, images, conditions=changed))
    monkeypatch.setattr(sys.modules["gencore_toy"], "bars", other)
    result = gencore("sample", conditioned / "toy-translator", "--from", "bars", "--out", tmp_path / "a.png")
    line = f"gencore: data set bars: {message} than the model was trained with\n"
    assert (result.code, result.err) == (2, line)


def test_classes_of_other_names_are_refused(gencore, trained, tmp_path, monkeypatch):
    toy = sys.modules["gencore_toy"]
    images, labels = toy.bars_of(None, "test", "bars")
    names = [f"other{i}" for i in range(8)]
    other = DatasetPlugin("bars", lambda path, split: ImageDataset("bars", split, images, labels, names))
    monkeypatch.setattr(toy, "bars", other)
    result = gencore("sample", trained / "toy-sampler", "--from", "bars", "--out", tmp_path / "a.png")
    line = "gencore: data set bars: its label has other classes than the model was trained with\n"
    assert (result.code, result.err) == (2, line)
