"""gencore profile, of small models and in few rounds."""

from __future__ import annotations

import functools
import io
import json

import pytest
import torch
from PIL import Image

from gencore.bench import profiling

VAE = ("vae", "--set", "hidden_sizes=16", "--batch-size", 8)
DDPM = ("ddpm", "--set", "channels=8,8", "--set", "num_groups=4", "--batch-size", 4)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(profiling, "_SESSIONS", 1)
    monkeypatch.setattr(profiling, "profile", functools.partial(profiling.profile, rounds=5, budget=0.3))


def test_a_table(gencore):
    result = gencore("profile", *VAE)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("training step of vae on digits, 8 images; ")
    assert lines[1].split() == ["PyTorch", "ms", "%", "gencore", "ms", "%", "gain"]
    rows = {line.split("  ")[0]: line.split() for line in lines[2:-1]}
    assert "matrix product" in rows
    assert "optimiser" in rows
    assert "convolution" not in rows
    before, after = (float(rows["all"][i]) for i in (1, 3))
    assert rows["all"][2] == rows["all"][4] == "100%"
    parts = [row for name, row in rows.items() if name != "all"]
    # Each figure is off by half of its last digit at most.
    rounding = (len(parts) + 1) * 0.51 * 10.0 ** -len(rows["all"][1].partition(".")[2])
    assert sum(float(row[-1 - (4 if row[-1].endswith("x") else 3)]) for row in parts) == pytest.approx(
        before, abs=rounding
    )
    assert sum(float(row[-1 - (2 if row[-1].endswith("x") else 1)]) for row in parts) == pytest.approx(
        after, abs=rounding
    )
    assert "times as fast" in lines[-1]
    assert "95%, 5 rounds" in lines[-1]


@pytest.mark.parametrize("step", ["training", "sampling"])
def test_files(gencore, tmp_path, step):
    torch.set_num_threads(2)
    files = ("--json", tmp_path / "new" / "a.json", "--png", tmp_path / "new" / "a.png")
    result = gencore("profile", *DDPM, "--step", step, "--device", "cpu", "--threads", 1, *files)
    assert (result.code, result.err) == (0, "")
    assert torch.get_num_threads() == 2
    assert f"{step} step of ddpm on digits, 4 images; " in result.out
    assert "1 thread\n" in result.out
    told = json.loads((tmp_path / "new" / "a.json").read_text())
    assert (told["model"], told["data"], told["step"], told["batch_size"]) == ("ddpm", "digits", step, 4)
    assert (told["threads"], told["machine"]["threads"], told["device"]) == (1, 1, "cpu")
    assert told["config"]["channels"] == [8, 8]
    assert sum(told["after"]["families"].values()) == pytest.approx(told["after"]["seconds"])
    picture = Image.open(io.BytesIO((tmp_path / "new" / "a.png").read_bytes()))
    assert picture.format == "PNG"
    assert picture.width > picture.height


def test_a_model_that_samples_at_once(gencore):
    result = gencore("profile", *VAE, "--step", "sampling")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("sampling of vae on digits, 8 images; ")


def test_the_folder_of_a_run(gencore, trained, tmp_path):
    result = gencore("profile", trained / "toy")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("training step of toy on bars, 16 images; ")
    assert not (trained / "toy" / "profile.json").exists()
    result = gencore("profile", trained / "toy", "--batch-size", 4, "--set", "hidden=3", "--json", tmp_path / "a")
    assert (result.code, result.err) == (0, "")
    told = json.loads((tmp_path / "a").read_text())
    assert (told["batch_size"], told["config"]["hidden"]) == (4, 3)


@pytest.mark.parametrize("step", ["training", "sampling"])
def test_a_run_of_two_stages(gencore, stage, step):
    result = gencore("profile", stage, "--batch-size", 4, "--step", step)
    assert (result.code, result.err) == (0, "")
    assert " of toy-stage on bars, 4 images; " in result.out


def test_a_model_samples_what_it_needs_of_the_images(gencore):
    result = gencore("profile", "toy-translator", "--data", "toy-pairs", "--batch-size", 4, "--step", "sampling")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("sampling of toy-translator on toy-pairs, 4 images; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vaee",), "no model plugin is called 'vaee'; did you mean vae"),
        ((".",), "run.json"),
        ((*VAE, "--data", "digit"), "no data set plugin is called 'digit'"),
        (("vae", "--set", "hidden_size=3"), "hidden_size: is not a setting"),
        (("vae", "--set", "latent_size=0"), "latent_size: must be >= 1, was 0"),
        (("vae", "--set", "train.clip=-1"), "train.clip: must be > 0"),
        (("vae", "--set", "x"), "--set takes name=value, got 'x'"),
        (("vae", "--batch-size", 0), "Invalid value for '--batch-size'"),
        ((*VAE, "--set", "train.batch_size=4"), "--batch-size and --set train.batch_size are the same setting"),
        (("vae", "--step", "dreaming"), "Invalid value for '--step'"),
        (("vae", "--png", "a.jpg"), "pictures are written as PNG"),
        (("vae", "--json", ""), "must not be empty"),
        ((), "Missing argument 'MODEL'"),
    ],
)
def test_mistakes_are_one_line(gencore, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = gencore("profile", *arguments)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err


def test_a_model_that_does_not_sample_is_one_line(gencore, monkeypatch):
    from gencore.models.vae import VAE as Model

    monkeypatch.delattr(Model, "generate")
    result = gencore("profile", *VAE, "--step", "sampling")
    assert (result.code, result.err) == (2, "gencore: --step sampling: model vae cannot sample\n")


def test_a_folder_that_cannot_be_written_to_is_one_line(gencore, tmp_path):
    (tmp_path / "file").touch()
    result = gencore("profile", *VAE, "--json", tmp_path / "file" / "a.json")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
