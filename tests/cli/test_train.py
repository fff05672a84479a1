"""gencore train: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from gencore import files
from gencore.data import DatasetPlugin, MissingSplitError
from gencore.train import Trainer, checkpoint
from gencore.train.log import read_metrics

QUICK = ("--data", "bars", "--steps", 6, "--batch-size", 8)


def test_a_run_is_written(gencore, tmp_path):
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "deep" / "run", "--set", "hidden=8", "--seed", 3)
    assert (result.code, result.err) == (0, "")
    assert "training toy" in result.out
    assert "step 6" in result.out
    run = checkpoint.read_run(tmp_path / "deep" / "run")
    assert (run.model, run.data, run.images) == ("toy", "bars", 60)
    assert run.config["hidden"] == 8
    assert run.spec["image_shape"] == [1, 4, 4]
    assert [(each["name"], each["kind"], len(each["names"])) for each in run.spec["conditions"]] == [
        ("label", "class", 8)
    ]
    assert (run.train["seed"], run.train["steps"], run.parts) == (3, 6, {})
    written = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert (written["run"]["spec"], written["run"]["parts"]) == (run.spec, {})


def test_resume_needs_the_folder_only_and_keeps_the_settings(gencore, tmp_path):
    gencore("train", "toy", *QUICK, "--out", tmp_path / "run", "--set", "hidden=8", "--ema", 0.9)
    result = gencore("train", "--out", tmp_path / "run", "--resume", "--steps", 9)
    assert result.code == 0, result.err
    assert checkpoint.read(tmp_path / "run").step == 9
    gencore("train", "toy", *QUICK, "--steps", 9, "--out", tmp_path / "whole", "--set", "hidden=8", "--ema", 0.9)
    for name, tensor in checkpoint.read(tmp_path / "whole").tensors("ema").items():
        assert torch.equal(tensor, checkpoint.read(tmp_path / "run").tensors("ema")[name])


def test_a_run_that_is_long_enough_says_so(gencore, tmp_path):
    gencore("train", "toy", *QUICK, "--out", tmp_path / "run")
    run = (tmp_path / "run" / "run.json").read_bytes()
    result = gencore("train", "--out", tmp_path / "run", "--resume", "--steps", 2)
    assert result == (0, f"{tmp_path / 'run'}: already at step 6\n", "")
    assert (tmp_path / "run" / "run.json").read_bytes() == run


def test_resume_begins_where_there_is_nothing(gencore, tmp_path):
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "run", "--resume")
    assert (result.code, result.err) == (0, "")
    assert checkpoint.read(tmp_path / "run").step == 6


def test_epochs(gencore, tmp_path):
    result = gencore("train", "toy", "--data", "bars", "--batch-size", 8, "--epochs", 2, "--out", tmp_path / "run")
    # The critic draws twice a step: 2 * 60 images in minibatches of 2 * 8.
    assert "for 8 steps" in result.out


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (("toyy", "--data", "bars"), ["no model plugin is called 'toyy'; did you mean toy"]),
        (("toy", "--data", "bar"), ["no data set plugin is called 'bar'; did you mean bars"]),
        (("toy", "--data", "bars:x"), ["data set bars takes no path"]),
        (("toy", "--data", "images:nowhere"), ["nowhere"]),
        ((), ["give the model to train, one of"]),
        (("--resume",), ["holds no run (there is no run.json); to begin one, name its MODEL, without --resume"]),
        (("toy", *QUICK, "--epochs", 2), ["give --steps or --epochs, not both"]),
        (("toy", *QUICK, "--set", "hidden"), ["--set takes name=value, got 'hidden'"]),
        (("toy", *QUICK, "--set", "hidden=1", "--set", "hidden=2"), ["--set hidden is given twice"]),
        (("toy", *QUICK, "--set", "train.steps=1"), ["--steps and --set train.steps are the same setting"]),
        (
            ("toy", *QUICK, "--ema", 0.9, "--set", "train.average.decay=0.9"),
            ["--ema and --set train.average.decay are the same setting"],
        ),
        (("toy", *QUICK, "--ema", 1), ["train.average.decay: must be < 1, was 1.0"]),
        (("toy", *QUICK, "--set", "train.ema=0.9"), ["did you mean train.average.decay?"]),
        (("toy", *QUICK, "--set", "train.average=0.9"), ["train.average: is a group of settings, set one of"]),
        (
            ("toy", *QUICK, "--precision", "float16", "--device", "cpu"),
            ["train.precision=float16 is for GPUs; bfloat16 runs on the CPU too"],
        ),
        (("toy", *QUICK, "--precision", "float8"), ["Invalid value for '--precision'"]),
        (("toy", *QUICK, "--set", "train.keep_best=true"), ["train.keep_best: must be false without validate_every"]),
        (("toy-translator", *QUICK), ["source: must be given by the data set, as toy-pairs does"]),
        (("toy-captions", *QUICK), ["data: must give what model toy-captions takes, but lack 'text'"]),
        (("toy", *QUICK, "--device", "tpu"), ["Invalid value for '--device'"]),
        (("toy", *QUICK, "--batch-size", "many"), ["Invalid value for '--batch-size'"]),
        (("toy", *QUICK, "--colour"), ["No such option"]),
        (("toy", *QUICK, "--data", ""), ["no data set plugin is called ''"]),
        (("toy", *QUICK, "--batch-size", 10**12), ["train.batch_size: must be <= 1048576, was 1000000000000"]),
        (("toy", *QUICK, "--set", f"hidden={10**30}"), ["not enough memory for the model toy"]),
        (
            ("toy", "--data", "bars", "--steps", 0, "--set", "hiden=3", "--set", "lr=-1", "--set", "train.clp=1",
             "--set", "image_shape=1,2,3"),
            [
                "hiden: is not a setting; did you mean hidden?",
                "image_shape: is not a setting; there are hidden, latent,",
                "lr: must be > 0, was -1.0",
                "train.clp: is not a setting; did you mean train.clip?",
                "train.steps: must be >= 1, was 0",
            ],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_lines_on_stderr(gencore, tmp_path, arguments, lines):
    result = gencore("train", *arguments, "--out", tmp_path / "run")
    assert result.code == 2
    said = result.err.splitlines()
    assert len(said) == len(lines), result.err
    for line, expected in zip(said, lines, strict=True):
        assert line.startswith("gencore: ")
        assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_refused(gencore, trained, tmp_path):
    result = gencore("train", "toy-sampler", *QUICK, "--out", trained / "toy")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "already holds a run" in result.err
    result = gencore("train", "toy-sampler", "--out", trained / "toy", "--resume")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "model: the run has 'toy', asked for is 'toy-sampler'" in result.err
    result = gencore("train", "--out", trained / "toy", "--resume", "--set", "hidden=99")
    assert (result.code, "hidden: the run has 16, asked for is 99" in result.err) == (2, True)


def test_an_empty_name_of_a_folder_is_refused(gencore, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = gencore("train", "toy", *QUICK, "--out", "")
    assert (result.code, result.err) == (2, "gencore: Invalid value for '--out': must not be empty\n")
    assert not list(tmp_path.iterdir())


def test_a_diverging_loss_is_one_line(gencore, tmp_path):
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "run", "--set", "explode_at=5")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "phase 'critic' is not finite at step 3" in result.err


def test_a_full_disk_is_one_line(gencore, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "run")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "No space left on device" in result.err
    assert str(tmp_path) in result.err


def test_an_unwritable_folder_is_one_line(gencore, tmp_path):
    (tmp_path / "file").write_text("")
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "file" / "run")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "Not a directory" in result.err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_the_step_and_says_how_to_go_on(gencore, tmp_path, monkeypatch, interruptible, name):
    number, out = getattr(signal, name), tmp_path / "my run"
    one_step = Trainer.advance

    def advance(self):
        one_step(self)
        if self.step == 3:
            os.kill(os.getpid(), number)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(Trainer, "advance", advance)
    result = gencore("train", "toy", *QUICK, "--out", out)
    assert result.code == 128 + number
    line = f"gencore: interrupted at step 3, step 3 is saved; go on with: gencore train --out '{out}' --resume"
    assert result.err == line + "\n"
    assert handlers == {each: signal.getsignal(each) for each in handlers}
    assert checkpoint.read(out).step == 3
    monkeypatch.setattr(Trainer, "advance", one_step)
    _, *arguments = shlex.split(line.partition("go on with: ")[2])
    assert gencore(*arguments).code == 0
    gencore("train", "toy", *QUICK, "--out", tmp_path / "whole")
    for tensors in ("model", "optimizer"):
        whole = checkpoint.read(tmp_path / "whole").tensors(tensors)
        for key, tensor in checkpoint.read(out).tensors(tensors).items():
            assert torch.equal(tensor, whole[key])


def test_a_second_signal_ends_at_once(gencore, tmp_path, monkeypatch, interruptible):
    def advance(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(Trainer, "advance", advance)
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "run")
    assert result.code == 130
    assert "interrupted at step 0, nothing is saved yet" in result.err


def test_interrupting_a_real_process(toy_environment, tmp_path):
    command = [sys.executable, "-m", "gencore", "train", "toy", "--data", "bars", "--out", str(tmp_path / "run")]
    options = ["--steps", "1000000", "--set", "train.checkpoint_every=20", "--batch-size", "8"]
    process = subprocess.Popen([*command, *options], env=toy_environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    step = checkpoint.read(tmp_path / "run").step
    assert err.startswith(f"gencore: interrupted at step {step}, step {step} is saved; go on with: gencore train --out")
    json.loads((tmp_path / "run" / "run.json").read_text())


def test_it_says_that_it_trains_only_when_it_does(gencore, trained, tmp_path):
    result = gencore("train", "toy", *QUICK, "--out", trained / "toy")
    assert (result.code, result.out) == (2, "")
    result = gencore("train", "--out", trained / "toy", "--resume", "--set", "hidden=99")
    assert (result.code, result.out) == (2, "")


@pytest.fixture
def pictures(tmp_path):
    """``pictures(folder, seed)`` writes ten images of the classes cat and dog."""

    def make(name, seed=0):
        generator = np.random.default_rng(seed)
        for i in range(10):
            path = tmp_path / name / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
        return tmp_path / name

    return make


def test_a_run_goes_on_where_its_images_were_moved_to(gencore, tmp_path, pictures):
    out = tmp_path / "run"
    assert gencore("train", "toy", "--data", f"images:{pictures('a')}", "--steps", 2, "--out", out).code == 0
    (tmp_path / "a").rename(tmp_path / "b")
    result = gencore("train", "--out", out, "--resume", "--steps", 3)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "if you moved the images, give their new place with --data" in result.err
    result = gencore("train", "--out", out, "--resume", "--steps", 3, "--data", f"images:{tmp_path / 'b'}")
    assert (result.code, result.err) == (0, "")
    assert checkpoint.read(out).run.data == f"images:{tmp_path / 'b'}"
    assert gencore("reconstruct", out).code == 0
    assert gencore("train", "--out", out, "--resume", "--steps", 4).code == 0


def test_a_run_does_not_go_on_with_other_images(gencore, tmp_path, pictures):
    out, folder = tmp_path / "run", pictures("a")
    assert gencore("train", "toy", "--data", f"images:{folder}", "--steps", 2, "--out", out).code == 0
    run = (out / "run.json").read_bytes()
    pictures("a", seed=1)
    result = gencore("train", "--out", out, "--resume", "--steps", 4)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert f"the images of images:{folder} differ from those that the run was trained on" in result.err
    pictures("a")
    assert gencore("train", "--out", out, "--resume", "--steps", 4).code == 0
    (folder / "cat").rename(folder / "zebra")
    result = gencore("train", "--out", out, "--resume", "--steps", 5)
    assert f"classes: data set images:{folder} lacks 'cat'" in result.err
    assert (out / "run.json").read_bytes() == run.replace(b'"steps": 2', b'"steps": 4')


def test_settings_of_the_data_set_are_kept(gencore, tmp_path, pictures):
    out, folder = tmp_path / "run", pictures("a")
    Image.fromarray(np.zeros((20, 30), dtype=np.uint8)).save(folder / "dog" / "large.png")
    (folder / "cat" / "bad.png").write_text("no image")
    (folder / "readme.txt").write_text("")
    settings = ("--set", "data.size=4", "--set", "data.skip_bad=true")
    result = gencore("train", "toy", "--data", f"images:{folder}", "--steps", 2, "--out", out, *settings[:2])
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "bad.png" in result.err
    result = gencore("train", "toy", "--data", f"images:{folder}", "--steps", 2, "--out", out, *settings)
    assert result.code == 0
    # What is true of both splits is said once.
    assert result.err.count("skipped 1 file") == 1
    assert result.err.count("bad.png") == 1
    run = checkpoint.read(out).run
    assert run.data_settings.items() >= {"size": 4, "skip_bad": True}.items()
    assert run.spec["image_shape"] == [1, 4, 4]
    assert gencore("train", "--out", out, "--resume", "--steps", 3).code == 0
    for command in ("reconstruct", "evaluate"):
        assert gencore(command, out).code == 0
    result = gencore("evaluate", out, "--set", "data.size=5")
    assert (result.code, "the model makes images of 1x4x4" in result.err) == (2, True)
    result = gencore("train", "--out", out, "--resume", "--steps", 4, "--set", "data.size=5")
    message = f"image_shape: the run has [1, 4, 4], data set images:{folder} has [1, 5, 5]"
    assert (result.code, message in result.err) == (2, True)


def test_a_damaged_test_image_is_found_before_training(gencore, tmp_path, pictures):
    (pictures("a")).rename(tmp_path / "train")
    pictures("b", seed=1).rename(tmp_path / "test")
    bad = tmp_path / "test" / "cat" / "0.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    out = tmp_path / "run"
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / split).rename(tmp_path / "data" / split)
    result = gencore("train", "toy", "--data", f"images:{tmp_path / 'data'}", "--steps", 2, "--out", out)
    assert (result.code, result.out, "test/cat/0.png" in result.err) == (2, "", True)
    assert not out.exists()


def test_a_run_begins_with_the_weights_of_another(gencore, trained, tmp_path):
    out = tmp_path / "run"
    result = gencore("train", "--from", trained / "toy", "--out", out, "--steps", 4, "--set", "lr=1e-5", "--seed", 9)
    assert (result.code, result.err) == (0, "")
    run, former = checkpoint.read(out).run, checkpoint.read(trained / "toy")
    assert run.start == str(former.directory)
    assert (run.config["lr"], run.config["hidden"], run.train["seed"]) == (1e-5, 16, 9)
    assert (run.train["average"], run.train["batch_size"]) == (None, 128)
    # So small a learning rate leaves them where they were: at the average of the other run.
    for name, tensor in checkpoint.read(out).tensors("model").items():
        if "weight" in name:
            torch.testing.assert_close(tensor, former.tensors("ema")[name], rtol=0, atol=1e-3)
    assert gencore("train", "--out", out, "--resume", "--steps", 5).code == 0
    assert checkpoint.read(out).run.start == run.start


def test_a_run_that_was_killed_at_once_keeps_the_weights_that_it_began_with(gencore, trained, tmp_path, monkeypatch):
    def advance(self):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", advance)
        assert gencore("train", "--from", trained / "toy", "--out", out, "--steps", 4).code == 130
    former = checkpoint.read(trained / "toy").tensors("ema")
    assert checkpoint.read(out).step == 0
    for name, tensor in checkpoint.read(out).tensors("model").items():
        assert torch.equal(tensor, former[name])
    shutil.rmtree(out / "checkpoints")
    result = gencore("train", "--out", out, "--resume")
    assert (result.code, "begin it anew, without --resume" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("toy-sampler", "--from", "RUN"), "holds model toy, but the model to train is toy-sampler"),
        (("--from", "RUN", "--resume"), "--from begins a new run, --resume goes on with one; give one of them"),
        (("--from", "RUN", "--set", "hidden=3"), "do not fit the model: encoder.0.weight of shape"),
        (("--from", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_weights_to_begin_with_that_do_not_fit_are_one_line(gencore, trained, tmp_path, arguments, message):
    arguments = [trained / "toy" if argument == "RUN" else argument for argument in arguments]
    result = gencore("train", *arguments, "--out", tmp_path / "run")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert message in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("learning_rate=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("train.lr=1", "optimizer.lr"),
        ("batch_size=8", "train.batch_size"),
        ("seed=1", "train.seed"),
        ("optimizr.lr=1", "optimizer.lr"),
        ("train.likelihood=gaussian", "likelihood"),
        ("train.ema=0.9", "train.average.decay"),
        ("data.lr=1", None),
    ],
)
def test_a_setting_of_another_group_is_named(gencore, tmp_path, setting, meant):
    result = gencore("train", "vae", "--set", setting, "--out", tmp_path / "run")
    name = setting.partition("=")[0]
    told = f"is not a setting; did you mean {meant}?" if meant else "is not a setting; data set digits has none"
    assert (result.code, result.err) == (2, f"gencore: {name}: {told}\n")


def test_blanks_around_the_name_of_a_setting_mean_nothing(gencore, tmp_path):
    assert gencore("train", "toy", *QUICK, "--set", " hidden =8", "--out", tmp_path / "run").code == 0
    assert checkpoint.read_run(tmp_path / "run").config["hidden"] == 8


def test_faults_of_all_groups_are_told_together(gencore, tmp_path, pictures):
    settings = ("--set", "data.sze=3", "--set", "train.stps=3")
    result = gencore("train", "toy", "--data", f"images:{pictures('a')}", "--out", tmp_path / "run", *settings)
    assert result.err.splitlines() == [
        "gencore: train.stps: is not a setting; did you mean train.steps?",
        "gencore: data.sze: is not a setting; did you mean data.size?",
    ]


def test_weights_that_are_not_finite_are_never_saved(gencore, tmp_path):
    out = tmp_path / "run"
    result = gencore("train", "toy-sampler", *QUICK, "--out", out, "--set", "lr=1e39", "--steps", 1)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "the weight mean is not finite at step 1; there is no checkpoint yet" in result.err


@pytest.mark.parametrize("method", ["_critic_loss", "phases"])
def test_an_error_of_a_plugin_names_it_and_the_step(gencore, tmp_path, monkeypatch, method):
    def broken(self, *arguments):
        raise KeyError("missing")

    monkeypatch.setattr(sys.modules["gencore_toy"].Toy, method, broken)
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "run")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "model plugin 'toy' (gencore_toy:toy) of package gencore-toy 1.0 is broken: " in result.err
    assert "KeyError: 'missing'" in result.err
    assert ("the loss of phase 'critic' at step 1" in result.err) == (method == "_critic_loss")


def test_weights_that_are_not_finite_are_refused_by_every_command(gencore, tmp_path):
    out = tmp_path / "run"
    gencore("train", "toy", *QUICK, "--out", out)
    saved = checkpoint.read(out)
    tensors = {name: saved.tensors(name) for name in ("model", "optimizer")}
    tensors["model"]["decoder.0.weight"][0] = float("nan")
    shutil.rmtree(saved.directory)
    checkpoint.save(out, saved.run, saved.step, tensors, saved.state, keep=1)
    for command in ("sample", "evaluate", "reconstruct", "interpolate", "traverse", "edit"):
        result = gencore(command, out)
        assert (result.code, len(result.err.splitlines())) == (2, 1), command
        assert "are of no use: decoder.0.weight is not finite" in result.err
    for arguments in (("--out", out, "--resume", "--steps", 9), ("--from", out, "--out", tmp_path / "new")):
        assert "decoder.0.weight is not finite" in gencore("train", *arguments).err


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
