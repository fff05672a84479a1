"""gencore train: settings from a file, dry runs, what is told on the way, stages."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from gencore.data import DatasetPlugin, MissingSplitError
from gencore.train import checkpoint
from gencore.train.log import read_metrics

QUICK = ("--data", "bars", "--steps", 6, "--batch-size", 8)

JSON = '{"hidden": 8, "train": {"steps": 4, "batch_size": 8, "average": {"decay": 0.9}}, "train.seed": 5}'
TOML = """
hidden = 8
"train.seed" = 5

[train]
steps = 4
batch_size = 8
average.decay = 0.9
"""


@pytest.mark.parametrize(("name", "text"), [("a.json", JSON), ("a.TOML", TOML), ("settings", JSON)])
def test_settings_come_from_a_file(gencore, tmp_path, name, text):
    if name == "a.TOML" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 cannot read TOML")
    (tmp_path / name).write_text(text)
    out = tmp_path / "run"
    result = gencore("train", "toy", "--data", "bars", "--config", tmp_path / name, "--out", out)
    assert (result.code, result.err) == (0, "")
    run = checkpoint.read(out).run
    assert (run.config["hidden"], run.config["latent"]) == (8, 3)
    assert (run.train["steps"], run.train["batch_size"], run.train["seed"]) == (4, 8, 5)
    assert run.train["average"]["decay"] == 0.9


def test_options_go_before_the_file(gencore, tmp_path):
    (tmp_path / "a.json").write_text(JSON)
    options = ("--set", "hidden=4", "--set", "train.average.decay=0.5", "--seed", 6, "--epochs", 1)
    result = gencore(
        "train", "toy", "--data", "bars", "--config", tmp_path / "a.json", "--out", tmp_path / "run", *options
    )
    assert (result.code, result.err) == (0, "")
    run = checkpoint.read(tmp_path / "run").run
    assert (run.config["hidden"], run.train["average"]["decay"], run.train["seed"]) == (4, 0.5, 6)
    # Epochs stand for steps too, which would else be those of the file.
    assert (run.train["steps"], run.train["epochs"], run.train["batch_size"]) == (None, 1, 8)
    assert checkpoint.read(tmp_path / "run").step == 4


def test_a_file_goes_with_a_run_that_goes_on(gencore, tmp_path):
    (tmp_path / "a.json").write_text(JSON)
    file = ("--config", tmp_path / "a.json", "--out", tmp_path / "run")
    assert gencore("train", "toy", "--data", "bars", *file).code == 0
    assert gencore("train", *file, "--resume", "--steps", 6).code == 0
    assert checkpoint.read(tmp_path / "run").step == 6
    (tmp_path / "a.json").write_text('{"hidden": 9}')
    result = gencore("train", *file, "--resume")
    assert (result.code, "hidden: the run has 8, asked for is 9" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.json", "{", ["a.json: is no JSON (Expecting property name"]),
        ("a.json", b"\xff", ["a.json: is no JSON"]),
        ("a.json", "[" * 100_000, ["a.json: is no JSON"]),
        ("a.json", "[1, 2]", ["a.json: must hold settings by name, but holds list"]),
        ("a.toml", "steps = ", ["a.toml: is no TOML"]),
        ("a.toml", b"x = '\xff'", ["a.toml: is no TOML"]),
        ("a.json", None, ["a.json: No such file or directory"]),
        ("", None, ["Is a directory"]),
        (
            "a.json",
            '{"hiden": 3, "lr": "big", "train": {"stps": 1, "average": 0.9}, "data": {"size": 3}}',
            [
                "hiden: is not a setting; did you mean hidden?",
                "lr: must be a number, was 'big'",
                "train.stps: is not a setting; did you mean train.steps?",
                "train.average: is a group of settings, set one of",
                "data.size: is not a setting; data set bars has none",
            ],
        ),
        ("a.json", '{"train": 3}', ["train: is not a setting"]),
        ("a.json", '{"hidden": 2.5}', ["hidden: must be an integer, was 2.5"]),
    ],
)
def test_mistakes_in_a_file_are_lines_on_stderr(gencore, tmp_path, name, text, lines):
    if name == "a.toml" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 cannot read TOML")
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    result = gencore("train", "toy", "--data", "bars", "--config", tmp_path / name, "--out", tmp_path / "run")
    said = result.err.splitlines()
    assert (result.code, len(said)) == (2, len(lines)), result.err
    for line, expected in zip(said, lines, strict=True):
        assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_would_run_and_writes_nothing(gencore, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--epochs", 2, "--batch-size", 8, "--out", tmp_path / "deep" / "run")
    result = gencore("train", "toy", "--data", "bars", *options, "--dry-run")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("toy (")
    assert lines[0].endswith("parameters) on bars, 60 images, for 8 steps on cpu")
    assert lines[1] == "  images    1x4x4, 8 classes"
    assert lines[2].startswith("  phase     critic: 17 parameters, Adam, twice a step, first loss ")
    assert lines[3].startswith("  phase     autoencoder: ")
    assert ", once a step, first loss " in lines[3]
    assert [line.split()[0] for line in lines[4:]] == ["memory", "time", "nothing"]
    assert list(tmp_path.iterdir()) == []
    # It is the first step of the training itself.
    assert gencore("train", "toy", "--data", "bars", *options, "--set", "train.log_every=1").code == 0
    first = read_metrics(tmp_path / "deep" / "run" / "metrics.jsonl")[0]
    assert lines[2].endswith(f"first loss {first['critic/loss']:.4g}")


def test_a_dry_run_finds_mistakes(gencore, tmp_path):
    for options, message in (
        (("--set", "explode_at=1"), None),
        (("--set", "hiden=1"), "hiden: is not a setting"),
        (("--set", f"hidden={10**30}"), "not enough memory for the model toy"),
    ):
        result = gencore("train", "toy", *QUICK, *options, "--dry-run", "--out", tmp_path / "run")
        assert (result.code, len(result.err.splitlines())) == (2, 1), options
        assert (message or "phase 'critic' is not finite at step 1") in result.err
        assert list(tmp_path.iterdir()) == []


def test_pictures_of_samples_are_drawn_on_the_way(gencore, tmp_path):
    settings = ("--set", "train.sample_every=2", "--set", "train.samples=9")
    result = gencore(
        "train", "toy-translator", *QUICK, "--data", "toy-pairs", "--steps", 5, *settings, "--out", tmp_path
    )
    assert (result.code, result.err) == (0, "")
    # The last step is drawn too.
    names = [f"step-{step:08}.png" for step in (2, 4, 5)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    drawn = [(tmp_path / "samples" / name).read_bytes() for name in names]
    assert len(set(drawn)) == 3
    assert Image.open(tmp_path / "samples" / names[0]).format == "PNG"
    # What sample writes by default has a place of its own.
    assert gencore("sample", tmp_path, "-n", 2, "--from", "toy-pairs", "--format", "png").code == 0
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_the_best_checkpoint_is_kept_and_can_be_sampled(gencore, tmp_path):
    """The learning rate is so large that the loss falls and rises again."""
    out = tmp_path / "run"
    every = ("log_every=4", "validate_every=2", "keep_best=true", "keep=1", "checkpoint_every=1")
    settings = [option for setting in every for option in ("--set", f"train.{setting}")]
    options = ("--data", "bars", "--steps", 20, "--batch-size", 60, "--set", "lr=0.15")
    result = gencore("train", "toy-sampler", *options, *settings, "--out", out)
    assert (result.code, result.err) == (0, "")
    records = read_metrics(out / "metrics.jsonl")
    validated = {r["step"]: r["validation/mean/loss"] for r in records if "validation/mean/loss" in r}
    assert list(validated) == list(range(2, 21, 2))
    best = min(validated, key=validated.__getitem__)
    assert 2 < best < 20
    link = out / "checkpoints" / "best"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "best", f"step-{best:08}", "step-00000020",
    ]  # fmt: skip
    assert checkpoint.read(link).step == best
    result = gencore("sample", link, "-n", 4, "--out", tmp_path / "a.png")
    assert (result.code, result.out) == (0, f"{tmp_path / 'a.png'}: 4 samples of toy-sampler on bars, step {best}\n")
    gencore("sample", link.resolve(), "-n", 4, "--out", tmp_path / "b.png")
    gencore("sample", out, "-n", 4, "--out", tmp_path / "c.png")
    content = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert content[0] == content[1] != content[2]
    # Without --out, pictures go to the run, not into what a better checkpoint replaces.
    assert gencore("sample", link).code == 0
    assert (out / "samples.png").exists()


def test_validation_needs_test_images(gencore, tmp_path, monkeypatch):
    toy = sys.modules["gencore_toy"]

    def load(path, split):
        if split == "test":
            raise MissingSplitError("bars has no test images")
        return toy.load_bars(path, split)

    monkeypatch.setattr(toy, "bars", DatasetPlugin("bars", load))
    result = gencore("train", "toy", *QUICK, "--set", "train.validate_every=1", "--out", tmp_path / "run")
    assert result.code == 2
    assert result.err.splitlines() == [
        "gencore: bars has no test images",
        "gencore: train.validate_every needs test images: bars has no test images",
    ]
    assert not (tmp_path / "run").exists()
    assert gencore("train", "toy", *QUICK, "--out", tmp_path / "run").code == 0


def test_a_run_of_two_stages_is_whole_by_itself(gencore, trained, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(trained / "toy", first)
    out = tmp_path / "run"
    result = gencore("train", "toy-stage", *QUICK, "--out", out, "--set", f"first={first}", "--ema", 0.9)
    assert (result.code, result.err) == (0, "")
    part = json.loads((out / "run.json").read_text())["run"]["parts"]["first"]
    assert (part["model"], part["config"]["hidden"], part["parts"]) == ("toy", 16, {})
    saved, former = checkpoint.read(out), checkpoint.read(first)
    for name, tensor in former.weights().items():
        # It is frozen, batch norm and all, and has no average.
        assert torch.equal(saved.tensors("model")[f"first.{name}"], tensor)
    assert set(saved.tensors("ema")) == {"center", "scale"}
    assert saved.tensors("model")["scale"] != 1
    shutil.rmtree(first)
    for command in (("sample", out), ("train", "--out", out, "--resume", "--steps", 8)):
        assert gencore(*command).code == 0, command
    assert checkpoint.read(out).step == 8
    assert gencore("train", "--from", out, "--out", tmp_path / "third", "--steps", 1).code == 0


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("", "first: must be the folder of a run of toy, was ''"),
        ("nowhere", "there is no folder nowhere"),
        ("SAMPLER", "of package gencore-toy 1.0 is broken: start(): AttributeError"),
    ],
)
def test_a_first_stage_that_cannot_be_taken_is_one_line(gencore, trained, tmp_path, first, message):
    first = trained / "toy-sampler" if first == "SAMPLER" else first
    result = gencore("train", "toy-stage", *QUICK, "--out", tmp_path / "run", "--set", f"first={first}")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_measured_and_not_trained(gencore, tmp_path):
    out = tmp_path / "run"
    result = gencore("train", "toy-mean", *QUICK, "--out", out)
    assert (result.code, result.out, result.err) == (0, f"{out}: done\n", "")
    assert checkpoint.read(out).step == 0
    assert gencore("sample", out).code == 0
    assert gencore("train", "toy-mean", *QUICK, "--out", tmp_path / "dry", "--dry-run").code == 0
