"""Checkpoints: whole or not there, and every damage named."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gencore import train
from gencore.plugins import PluginError
from gencore.spec import Condition, DataSpec
from gencore.train import CheckpointError, Run, checkpoint

SPEC = DataSpec((1, 4, 4), (Condition("label", "class", ("a", "b")),)).to_dict()
RUN = Run("toy", {"hidden": 16}, SPEC, "bars", {}, 60, "0" * 64, {"seed": 0}, parts={"first": {"model": "toy"}})


def save(directory: Path, step: int, keep: int = 2, **tensors: torch.Tensor) -> Path:
    return checkpoint.save(directory, RUN, step, {"model": tensors or {"w": torch.ones(3)}}, {"seconds": 0.5}, keep)


def test_what_was_saved_is_read(tmp_path):
    shared = torch.arange(6.0)
    tensors = {
        "view": shared[2:4],
        "tied": shared,
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0),
    }
    folder = save(tmp_path, 7, **tensors, also=shared)
    saved = checkpoint.read(tmp_path)
    assert (saved.directory, saved.step, saved.run, saved.state) == (folder, 7, RUN, {"seconds": 0.5})
    assert checkpoint.read(folder) == saved
    assert not saved.has_ema
    for name, tensor in {**tensors, "also": shared}.items():
        assert torch.equal(saved.tensors("model")[name], tensor)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 5, 100000000, 20):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000020", "step-100000000"]
    assert checkpoint.read(tmp_path).step == 100000000


def test_no_pickle_is_written(trainer, tmp_path):
    trainer(tmp_path / "run", average={"decay": 0.9}).fit()
    files = sorted(path.name for path in checkpoint.checkpoints(tmp_path / "run")[-1].iterdir())
    assert files == ["checkpoint.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors"]


def test_the_names_of_what_is_kept(trainer, tmp_path):
    trainer(tmp_path / "run", {"every": 1}, "toy-phases", average={"decay": 0.9}, steps=2, log_every=9).fit()
    saved = checkpoint.read(tmp_path / "run")
    model = set(saved.tensors("model"))
    assert model == {"mean", "spread", "critic.weight", "critic.bias", "table.weight", "table.bias"}
    assert set(saved.tensors("ema")) == model
    # An optimiser is called like the first phase that has it.
    critic = {f"critic/critic.weight/{state}" for state in ("step", "square_avg")}
    critic |= {f"critic/critic.bias/{state}" for state in ("step", "square_avg", "momentum_buffer")}
    moments = ("step", "mu_product", "exp_avg", "exp_avg_sq")
    table = {f"table/table.{name}/{state}" for name in ("weight", "bias") for state in moments}
    shared = {"mean/mean/momentum_buffer", "mean/spread/momentum_buffer"}
    assert set(saved.tensors("optimizer")) == critic | table | shared
    assert saved.state.keys() == {"seconds", "total_steps", "phases"}
    assert saved.state["phases"].keys() == {"mean", "spread", "critic", "table"}
    assert all(phase.keys() == {"meter", "scaler"} for phase in saved.state["phases"].values())
    assert checkpoint.read_run(tmp_path / "run") == saved.run
    assert saved.run.spec["image_shape"] == [1, 4, 4]
    assert saved.run.parts == {}


def test_the_best_is_kept_beside_the_newest(tmp_path):
    def marked(step, is_best=False):
        tensors = {"model": {"w": torch.full((1,), float(step))}}
        checkpoint.save(tmp_path, RUN, step, tensors, {}, keep=2, is_best=is_best)
        return sorted(os.listdir(tmp_path / "checkpoints"))

    assert checkpoint.best_step(tmp_path) is None
    marked(1)
    assert marked(2, True) == ["best", "step-00000001", "step-00000002"]
    marked(3)
    assert marked(4) == ["best", "step-00000002", "step-00000003", "step-00000004"]
    best = checkpoint.read(tmp_path / "checkpoints" / "best")
    assert (best.step, float(best.tensors("model")["w"])) == (2, 2.0)
    assert checkpoint.best_step(tmp_path) == 2
    # Another is the best one: the former is kept no longer.
    assert marked(5, True) == ["best", "step-00000004", "step-00000005"]
    assert checkpoint.read(tmp_path).step == 5


def test_leftovers_of_a_crash_are_no_checkpoints_and_go(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.tmp").mkdir()
    (tmp_path / "checkpoints" / ".step-00000000.old").mkdir()
    (tmp_path / "checkpoints" / ".best.tmp").symlink_to("step-00000002")
    assert checkpoint.read(tmp_path).step == 1
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000002"]


@pytest.fixture
def finished(trainer, tmp_path) -> Path:
    trainer(tmp_path / "run", average={"decay": 0.9}, steps=2).fit()
    return tmp_path / "run"


def test_missing_files_are_named(finished, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        train.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no run"):
        train.load(tmp_path)
    folder = checkpoint.checkpoints(finished)[-1]
    (folder / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is missing"):
        train.load(finished)
    train.load(finished, ema=False)
    (folder / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is missing"):
        train.load(finished)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        train.load(finished)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer"])
def test_damaged_weights_are_named(finished, damage):
    path = checkpoint.checkpoints(finished)[-1] / "model.safetensors"
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"cut": data[:middle], "flip": flipped, "empty": b"", "longer": data + b"\0"}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        train.load(finished, ema=False)


def test_damaged_json_is_named(finished):
    path = checkpoint.checkpoints(finished)[-1] / "checkpoint.json"
    text = path.read_text()
    for damaged in ("", "{", "[]", "{}", text[:-20], text.replace('"step": 2', '"step": 3'), '{"format": 3}', "\x00"):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged"):
            train.load(finished)
    for name in ("run.json",):
        for damaged in ("", '{"format": 3, "run": {}}', '{"format": 3, "run": {"model": 3}}'):
            (finished / name).write_text(damaged)
            with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
                checkpoint.read_run(finished)


def test_json_nested_too_deeply_is_named(finished):
    for path in (finished / "run.json", checkpoint.checkpoints(finished)[-1] / "checkpoint.json"):
        path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged"):
        train.load(finished)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        checkpoint.read_run(finished)


def test_a_run_may_be_called_like_a_checkpoint(trainer, tmp_path):
    trainer(tmp_path / "step-1", steps=2).fit()
    assert checkpoint.read(tmp_path / "step-1").step == 2
    (tmp_path / "step-2").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is missing"):
        checkpoint.read(tmp_path / "step-2")


def test_another_format_is_refused(finished):
    path = checkpoint.checkpoints(finished)[-1] / "checkpoint.json"
    for number, age in ((4, "newer"), (2, "older")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
        with pytest.raises(CheckpointError, match=f"an? {age} gencore: it has format {number}, this gencore reads 3"):
            train.load(finished)


def test_no_average_is_an_error_only_if_asked_for(trainer, tmp_path):
    trainer(tmp_path / "run", steps=1).fit()
    train.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"holds no moving average \(it was trained without train\.average\)"):
        train.load(tmp_path / "run", ema=True)


def test_a_model_that_is_not_installed_or_changed_is_an_error(finished, toy_environment):
    saved = checkpoint.read(finished)
    run = saved.run
    unknown = replace(run, model="toyy")
    folder = checkpoint.save(finished, unknown, 3, {"model": saved.tensors("model")}, {}, keep=9)
    with pytest.raises(PluginError, match="'toyy'; did you mean toy"):
        train.load(folder)
    changed = replace(run, config={**run.config, "colour": 1})
    folder = checkpoint.save(finished, changed, 4, {"model": saved.tensors("model")}, {}, keep=9)
    with pytest.raises(CheckpointError, match="of another version of toy: colour: is not a setting"):
        train.load(folder)


def test_weights_that_do_not_fit_are_named():
    model = nn.Linear(2, 3)
    for weights, message in (
        ({"weight": torch.zeros(3, 2)}, "without bias"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "b": torch.zeros(3)}, "with b, which the model lacks"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, r"weight of shape \(2, 3\) for \(3, 2\)"),
        ({"weight": torch.zeros(3, 2), "bias": torch.tensor([0, torch.inf, 0])}, "bias is not finite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.fill_model(model, weights, Path("run"))


class FullDisk:
    """Stands for ``open``: files opened for writing take ``room`` bytes in all, then the disk is full."""

    def __init__(self, room: int):
        self.room, self.real = room, builtins.open

    def __call__(self, file, mode="r", *args, **kwargs):
        opened = self.real(file, mode, *args, **kwargs)
        if "w" in mode or "a" in mode:
            write = opened.write

            def limited(data):
                self.room -= len(data)
                if self.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(data)

            return _Writer(opened, limited)
        return opened


class _Writer:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


@pytest.mark.parametrize("room", [0, 500, 5000, 12000])
def test_a_full_disk_leaves_the_last_checkpoint(trainer, tmp_path, monkeypatch, room):
    trainer(tmp_path / "whole", steps=8).fit()
    trainer(tmp_path / "run", steps=4).fit()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", FullDisk(room))
        with pytest.raises(OSError, match="No space left on device") as caught:
            trainer(tmp_path / "run", steps=8).fit(resume=True)
    assert caught.value.filename
    assert checkpoint.read(tmp_path / "run").step == 4
    assert not list((tmp_path / "run").rglob("*.tmp"))
    trainer(tmp_path / "run", steps=8).fit(resume=True)
    for name, tensor in checkpoint.read(tmp_path / "whole").tensors("model").items():
        assert torch.equal(tensor, checkpoint.read(tmp_path / "run").tensors("model")[name])


def test_a_disk_that_is_really_full(trainer, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            trainer(disk / "run", steps=40, keep=9, checkpoint_every=1).fit()
        saved = checkpoint.read(disk / "run")
        assert saved.step >= 1
        train.load(disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
