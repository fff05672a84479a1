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
from gencore.train import Trainer, checkpoint

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
