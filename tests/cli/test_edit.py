"""gencore edit, and settings of sampling, with a diffusion model of a few steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import Key, data, metrics, train
from gencore.cli import edit
from gencore.cli.common import UserError
from gencore.cli.edit import MASKS, edited, known_pixels
from gencore.models.diffusion import Sampling

QUICK = ("--set", "sampler=ddim", "--set", "steps=4")


@pytest.fixture(scope="module")
def ddpm(toy_environment, tmp_path_factory):
    """A run of ``ddpm`` on digits, of a few steps so large that classes matter."""
    from gencore.cli import main

    folder = tmp_path_factory.mktemp("ddpm") / "run"
    settings = ("channels=8,16", "num_groups=4", "conditional=true", "parameterization=v", "optimizer.lr=0.03")
    options = [option for setting in settings for option in ("--set", setting)]
    assert main(["train", "ddpm", "--steps", "12", "--batch-size", "8", "--out", str(folder), *options]) == 0
    return folder


def test_pictures_are_written(gencore, ddpm, tmp_path):
    result = gencore("edit", ddpm, "-n", 4, "--fills", 2, *QUICK)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{ddpm / 'edits.png'}: 4 test images with a part filled in 2 times, ddpm on digits, step 12\n"
    whole = np.asarray(Image.open(ddpm / "edits.png"))
    out = tmp_path / "grid.png"
    for options, same in (((), True), (("--seed", 1), False), (("--mask", "border"), False), (("--labels", 3), False)):
        assert gencore("edit", ddpm, "-n", 4, "--fills", 2, *QUICK, "--out", out, *options).code == 0
        assert np.array_equal(np.asarray(Image.open(out)), whole) == same, options


def test_known_pixels_stay_and_the_batch_size_changes_nothing(ddpm):
    model, sampling = train.load(ddpm), Sampling(sampler="ddpm", steps=4)
    images, known = data.load("digits", "test").batch(torch.arange(5)).images, known_pixels("left", (1, 8, 8))
    whole = edited(model, images, known, Key(0), 5, sampling=sampling)
    assert torch.equal(whole[..., 4:], images[..., 4:])
    assert not torch.isclose(whole[..., :4], images[..., :4], atol=1e-3).all()
    torch.testing.assert_close(edited(model, images, known, Key(0), 2, sampling=sampling), whole, rtol=0, atol=1e-4)


def test_rows_are_images_what_is_known_and_fills(ddpm, monkeypatch):
    seen = []
    monkeypatch.setattr(edit.pictures, "grid", lambda *arguments: seen.append(arguments))
    model, sampling = train.load(ddpm), Sampling(sampler="ddim", steps=4)
    images, known = data.load("digits", "test").batch(torch.arange(3)).images, known_pixels("top", (1, 8, 8))
    edit.edit_picture(model, images, known, 2, Key(0), sampling=sampling)
    ((rows, columns, labels),) = seen
    assert (columns, labels) == (3, ["image", "known", "model", "model"])
    rows = rows.unflatten(0, (4, 3))
    assert torch.equal(rows[0], images)
    assert torch.equal(rows[1][..., 4:, :], images[..., 4:, :])
    assert (rows[1][..., :4, :] == 0.5).all()
    assert torch.equal(rows[2:][..., 4:, :], images[..., 4:, :].expand(2, -1, -1, -1, -1))
    assert not torch.allclose(rows[2], rows[3]), "two fills must differ"


def test_masks():
    kept = {name: known_pixels(name, (3, 8, 10))[0, 0] for name in MASKS}
    assert all(known.shape == (8, 10) and known.dtype == torch.float32 for known in kept.values())
    assert torch.equal(kept["center"] + kept["border"], torch.ones(8, 10))
    assert kept["center"].sum() == 80 - 4 * 6
    assert kept["center"][2:6, 2:8].sum() == 0
    for a, b in (("left", "right"), ("top", "bottom")):
        assert torch.equal(kept[a] + kept[b], torch.ones(8, 10))
    assert kept["left"][:, :5].sum() == kept["top"][:4].sum() == 0


def test_a_mask_from_a_file(gencore, ddpm, tmp_path):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[2:5, 1:3] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    known = known_pixels(str(tmp_path / "mask.png"), (1, 8, 8))
    assert torch.equal(known[0, 0], torch.from_numpy((pixels == 0).astype(np.float32)))
    assert gencore("edit", ddpm, "--mask", tmp_path / "mask.png", "-n", 1, "--fills", 1, *QUICK).code == 0
    with pytest.raises(UserError, match="has 8x8 pixels, the model's images have 9x8"):
        known_pixels(str(tmp_path / "mask.png"), (1, 8, 9))
    Image.fromarray(0 * pixels).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="hides nothing of an image of 8x8 pixels"):
        known_pixels(str(tmp_path / "black.png"), (1, 8, 8))


def test_fills_share_no_noise_with_what_is_measured(ddpm, monkeypatch):
    """evaluate folds small numbers into the same seed."""
    keys = []
    monkeypatch.setattr(edit.pictures, "grid", lambda *arguments: None)
    zeros = torch.zeros(1, 1, 8, 8)
    monkeypatch.setattr(edit, "edited", lambda *arguments, **options: keys.append(arguments[3]) or zeros)
    edit.edit_picture(train.load(ddpm), torch.zeros(1, 1, 8, 8), known_pixels("top", (1, 8, 8)), 8, Key(3))
    fills = {tuple(key.packed.tolist()) for key in keys}
    assert len(fills) == 8
    assert not fills & {tuple(Key(3).fold_in(purpose).packed.tolist()) for purpose in range(100)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mask", "middle"), "--mask must be one of center, left, right, top, bottom, border or a picture"),
        (("--mask", __file__), "cannot be read as a picture"),
        (
            ("--labels", "10"),
            "--labels takes names of classes, got '10'; the classes are '0',",
        ),
        (("--out", "x.jpg"), "pictures are written as PNG, got a name in .jpg"),
        (("--fills", 0), "Invalid value for '--fills'"),
        (("--set", "sampler=dim"), "sampler: must be one of 'ddpm', 'ddim'"),
        (("--set", "step=4"), "step: is not a setting; did you mean steps?"),
        (("--set", "steps=1001"), "steps: must be <= 1000, the timesteps of the training, was 1001"),
        (("--set", "steps"), "--set takes name=value, got 'steps'"),
        (("--set", "steps=3", "--set", "steps=4"), "--set steps is given twice"),
    ],
)
def test_mistakes_are_one_line(gencore, ddpm, arguments, message):
    result = gencore("edit", ddpm, *arguments)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result.err
    assert message in result.err


def test_other_models_say_that_they_cannot(gencore, trained):
    result = gencore("edit", trained / "toy")
    assert (result.code, result.err) == (2, "gencore: model toy cannot edit images\n")
    for command in ("sample", "evaluate", "edit"):
        result = gencore(command, trained / "toy", "--set", "steps=5")
        assert (result.code, result.err) == (2, "gencore: --set: model toy has no settings of sampling\n")


def test_settings_of_sampling_replace_those_of_the_run(gencore, ddpm, tmp_path):
    out, pixels = tmp_path / "a.png", {}
    for name, options in {
        "quick": QUICK,
        "again": QUICK,
        "sampler": ("--set", "sampler=dpm_solver", "--set", "steps=4"),
        "steps": ("--set", "sampler=ddim", "--set", "steps=5"),
        "labels": (*QUICK, "--labels", "1"),
        "guided": (*QUICK, "--labels", "1", "--set", "guidance_scale=5"),
    }.items():
        assert gencore("sample", ddpm, "-n", 4, "--out", out, *options).code == 0
        pixels[name] = out.read_bytes()
    assert pixels["quick"] == pixels.pop("again")
    assert len(set(pixels.values())) == len(pixels)


def test_another_sampler_may_be_asked_for_whatever_the_run_has(gencore, tmp_path):
    """As the run of quickstart has it: resampling, which dpm_solver cannot do, is of edit, and of the run's sampler."""
    out = tmp_path / "a.png"
    settings = ("channels=8", "num_groups=4", "sampling.sampler=ddim", "sampling.steps=4", "sampling.resamples=5")
    options = [option for setting in (*settings, "sampling.eta=0.5") for option in ("--set", setting)]
    assert gencore("train", "ddpm", "--steps", 1, "--batch-size", 4, "--out", tmp_path / "run", *options).code == 0
    for command in ("sample", "edit"):
        result = gencore(command, tmp_path / "run", "-n", 1, "--out", out, "--set", "sampler=dpm_solver")
        assert (result.code, result.err) == (0, "")
    both = ("--set", "sampler=dpm_solver", "--set", "resamples=2")
    assert gencore("sample", tmp_path / "run", "-n", 1, "--out", out, *both).code == 0
    result = gencore("edit", tmp_path / "run", "-n", 1, "--out", out, *both)
    assert (result.code, result.err) == (2, "gencore: resamples: must be 1 for sampler=dpm_solver, was 2\n")
    result = gencore("sample", tmp_path / "run", "--set", "sampler=euler", "--set", "eta=0.5")
    assert (result.code, result.err) == (2, "gencore: eta: is for sampler=ddim only, was 0.5 for euler\n")
    # A model without classes has nothing to be guided to.
    for command in ("sample", "edit"):
        result = gencore(command, tmp_path / "run", "--set", "guidance_scale=2")
        message = "gencore: guidance_scale: must be 1 for a model without classes, was 2\n"
        assert (result.code, result.err) == (2, message)
        result = gencore(command, tmp_path / "run", "--labels", 1)
        assert (result.code, result.err) == (2, "gencore: --labels: model ddpm samples without classes\n")


@pytest.mark.parametrize("name", ["guidance_scale=2", "guidance_rescale=0.5"])
def test_guidance_needs_classes(gencore, ddpm, tmp_path, name):
    for command in ("sample", "edit"):
        result = gencore(command, ddpm, *QUICK, "--set", name)
        said = f"--set {name.partition('=')[0]}: has no effect without a condition, such as --labels"
        assert (result.code, result.err) == (2, f"gencore: {said}\n")
    # The classes of test images are conditions too.
    options = ("-n", 2, "--from", "digits", "--out", tmp_path / "a.png")
    assert gencore("sample", ddpm, *QUICK, "--set", name, *options).code == 0


def test_faults_of_sampling_are_named_as_they_were_given(gencore, tmp_path):
    options = ("--set", "timesteps=30", "--set", "sampling.steps=40")
    result = gencore("train", "ddpm", "--out", tmp_path / "run", *options)
    message = "gencore: sampling.steps: must be <= 30, the timesteps of the training, was 40\n"
    assert (result.code, result.err) == (2, message)


@pytest.mark.parametrize("command", ["sample", "edit"])
def test_no_picture_is_made_of_what_is_not_finite(gencore, ddpm, tmp_path, command):
    options = (*QUICK, "--labels", 1, "--set", "guidance_scale=1e300", "--out", tmp_path / "a.png")
    result = gencore(command, ddpm, "-n", 2, *options)
    message = "gencore: the state after the step is not finite in call 0 of 4, at time 999\n"
    assert (result.code, result.err) == (2, message)
    assert not (tmp_path / "a.png").exists()


def test_what_is_not_finite_is_measured_as_far_as_it_can_be(gencore, ddpm, tmp_path):
    out = tmp_path / "e.json"
    options = ("-n", 20, "--num-samples", 2, "--limit", 4, "--set", "guidance_scale=1e300", "--out", out)
    result = gencore("evaluate", ddpm, *QUICK, *options)
    assert (result.code, result.err) == (0, "")
    told = json.loads(out.read_text())
    assert told["frechet"]["distance"] > 0
    # Guidance is of the samples with classes only.
    assert told["conditional"] == {"accuracy": 0.0, "confident": 0.0, "frechet": None}


def test_classes_that_the_model_does_not_know_are_not_asked_for(gencore, ddpm, tmp_path):
    """Other images than those of the training: of 12 classes, and of 10 with other names."""
    for names, why in (
        ([f"kind{i:02}" for i in range(12)], "has 12 classes, the model has 10"),
        ([f"kind{i}" for i in range(10)], "has other classes than digits"),
        ([str(i) for i in range(10)], None),
    ):
        folder = tmp_path / f"{len(names)}{names[0]}"
        for split in ("train", "test"):
            for i, name in enumerate(names):
                place = folder / split / name
                place.mkdir(parents=True)
                for shade in range(2):
                    Image.fromarray(np.full((8, 8), 20 * i + shade, dtype=np.uint8)).save(place / f"{shade}.png")
        out = tmp_path / "e.json"
        options = ("-n", 6, "--num-samples", 2, "--limit", 2, "--data", f"images:{folder}", "--out", out)
        result = gencore("evaluate", ddpm, *QUICK, *options)
        assert (result.code, result.err) == (0, "")
        told = json.loads(out.read_text())
        assert len(told["classes"]["class_names"]) == len(names)
        assert ("conditional" in told) == (why is None)
        assert (f"left out: data set {folder.name} {why}" in result.out) == (why is not None), result.out


def test_a_run_has_sampling_settings_of_its_own(gencore, tmp_path):
    settings = ("channels=8", "num_groups=4", "sampling.sampler=ddim", "sampling.steps=7")
    options = [option for setting in settings for option in ("--set", setting)]
    assert gencore("train", "ddpm", "--steps", 1, "--batch-size", 4, "--out", tmp_path / "run", *options).code == 0
    assert train.load(tmp_path / "run").sampling == Sampling(sampler="ddim", steps=7)


def test_evaluate_measures_a_model_with_classes(gencore, ddpm, tmp_path):
    out = tmp_path / "e.json"
    options = ("-n", 30, "--num-samples", 3, "--limit", 20, "--set", "guidance_scale=2.0")
    result = gencore("evaluate", ddpm, *QUICK, *options, "--out", out)
    assert (result.code, result.err) == (0, "")
    told = json.loads(out.read_text())
    assert (told["sampling"]["steps"], told["sampling"]["guidance_scale"]) == (4, 2.0)
    assert told["bound_k"]["num_samples"] == 3
    assert told["frechet"]["measure"] == metrics.FRECHET_NAME
    assert (told["frechet"]["samples"], told["frechet"]["train_images"], told["frechet"]["test_images"]) == (
        30,
        30,
        297,
    )
    assert 0 < told["frechet"]["train_distance"] < told["frechet"]["distance"]
    assert told["conditional"].keys() == {"accuracy", "confident", "frechet"}
    assert 0 <= told["conditional"]["accuracy"] <= 1
    assert metrics.FRECHET_NAME in result.out
    assert "with classes: accuracy of the classes" in result.out
