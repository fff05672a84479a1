"""gencore train: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gencore import files
from gencore.train import checkpoint

QUICK = ("--data", "bars", "--steps", 6, "--batch-size", 8)


def test_a_run_is_written(gencore, tmp_path):
    result = gencore("train", "toy", *QUICK, "--out", tmp_path / "deep" / "run", "--set", "hidden=8", "--seed", 3)
    assert (result.code, result.err) == (0, "")
    assert "training toy" in result.out
    assert "step 6" in result.out
    run = checkpoint.read_run(tmp_path / "deep" / "run")
    assert (run.model, run.data, run.images) == ("toy", "bars", 60)
    assert run.config["hidden"] == 8
    assert run.config["image_shape"] == [1, 4, 4]
    assert run.config["num_classes"] == 8
    assert (run.train["seed"], run.train["steps"]) == (3, 6)


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
        (("toy", *QUICK, "--device", "tpu"), ["Invalid value for '--device'"]),
        (("toy", *QUICK, "--batch-size", "many"), ["Invalid value for '--batch-size'"]),
        (("toy", *QUICK, "--colour"), ["No such option"]),
        (("toy", *QUICK, "--data", ""), ["no data set plugin is called ''"]),
        (("toy", *QUICK, "--batch-size", 10**12), ["train.batch_size: must be <= 1048576, was 1000000000000"]),
        (("toy", *QUICK, "--set", f"hidden={10**30}"), ["not enough memory for the model toy"]),
        (
            ("toy", "--data", "bars", "--steps", 0, "--set", "hiden=3", "--set", "lr=-1", "--set", "train.emma=1",
             "--set", "image_shape=1,2,3"),
            [
                "image_shape: comes from the data set and cannot be set",
                "hiden: is not a setting; did you mean hidden?",
                "lr: must be > 0, was -1.0",
                "train.emma: is not a setting; did you mean ema?",
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


def test_interrupting_says_how_to_go_on(toy_environment, tmp_path):
    command = [sys.executable, "-m", "gencore", "train", "toy", "--data", "bars", "--out", str(tmp_path / "run")]
    options = ["--steps", "1000000", "--set", "train.checkpoint_every=20", "--batch-size", "8"]
    process = subprocess.Popen([*command, *options], env=toy_environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: gencore train --out" in err
    assert "Traceback" not in err
    json.loads((tmp_path / "run" / "run.json").read_text())
