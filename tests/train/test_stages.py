"""Models that begin with other runs, and such as have nothing to train."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from train.comparing import assert_same, assert_same_runs, stopping, weights

from gencore import Key, data, train
from gencore.config import ConfigError
from gencore.models.base import GenerativeModel, ModelPlugin, is_frozen, parts_of
from gencore.plugins import MODELS, PluginError
from gencore.train import CheckpointError, checkpoint


@pytest.fixture
def first(trainer, tmp_path) -> Path:
    """A trained autoencoder, with a moving average."""
    trainer(tmp_path / "first", average={"decay": 0.5}, steps=4).fit()
    return tmp_path / "first"


def stage(trainer, out, first, **settings):
    return trainer(out, {"first": str(first)}, "toy-stage", **{"average": {"decay": 0.9}, **settings})


def test_a_second_stage_is_whole_without_the_first(trainer, tmp_path, first):
    encoder = train.load(first).encoder.state_dict()
    trained = stage(trainer, tmp_path / "second", first).fit()
    images = trained.sample(5, Key(1))
    shutil.rmtree(first)
    loaded = train.load(tmp_path / "second", ema=False)
    assert torch.equal(loaded.sample(5, Key(1)), images)
    assert torch.equal(loaded.scale, trained.scale)
    assert loaded.scale != 1
    # What was taken over are the weights with which a run is sampled: their average.
    assert_same(loaded.first.encoder.state_dict(), encoder)
    assert torch.isfinite(train.load(tmp_path / "second").sample(2, Key(0))).all()


def test_a_model_among_the_networks_of_another_is_no_part(trainer, tmp_path, monkeypatch):
    plugin = MODELS.load("toy-mean")

    class Outer(plugin.build):
        def __init__(self, config, spec):
            super().__init__(config, spec)
            self.inner = plugin.build(config, spec)

    monkeypatch.setattr(MODELS, "load", lambda name: ModelPlugin("toy-mean", "toy", plugin.config, Outer))
    trainer(tmp_path / "run", plugin=MODELS.load("toy-mean")).fit()
    assert checkpoint.read_run(tmp_path / "run").parts == {}
    assert isinstance(train.load(tmp_path / "run").inner, plugin.build)


def test_what_goes_wrong_when_a_part_is_adopted_again_names_the_plugin(trainer, tmp_path, first, monkeypatch):
    stage(trainer, tmp_path / "second", first).fit()
    monkeypatch.setattr(MODELS.load("toy-stage").build, "on_adopt", lambda self, name, part: 1 / 0)
    with pytest.raises(PluginError, match=r"'toy-stage' .* is broken: adopt\('first'\): ZeroDivisionError"):
        train.load(tmp_path / "second")


def test_a_frozen_part_is_left_alone(trainer, tmp_path, first):
    made = stage(trainer, tmp_path / "second", first)
    made.begin()
    part = made.model.first
    assert is_frozen(part)
    assert made.model.training
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    (runner,) = made.runners

    def spy(step, *, loss=runner.loss.loss):
        assert made.model.training
        assert not any(module.training for module in part.modules())
        return loss(step)

    runner.loss.loss = spy
    made.fit()
    assert_same(before, part.state_dict())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in part.parameters())
    assert {name.split("/")[1] for name in weights(tmp_path / "second", "optimizer")} == {"center"}
    assert weights(tmp_path / "second", "ema").keys() == {"center", "scale"}
    assert any(name.startswith("first.encoder") for name in weights(tmp_path / "second"))


def test_a_loaded_part_is_frozen_too(trainer, tmp_path, first):
    stage(trainer, tmp_path / "second", first, steps=1).fit()
    loaded = train.load(tmp_path / "second").train()
    assert loaded.training
    assert is_frozen(loaded.first)
    assert not any(module.training for module in loaded.first.modules())
    assert not any(parameter.requires_grad for parameter in loaded.first.parameters())


@pytest.mark.parametrize("stop_after", [0, 1, 6])
def test_a_run_that_goes_on_does_not_start_again(trainer, tmp_path, first, monkeypatch, stop_after):
    stage(trainer, tmp_path / "whole", first).fit()
    with pytest.raises(KeyboardInterrupt):
        stopping(stage(trainer, tmp_path / "parts", first), stop_after).fit()
    shutil.rmtree(first)

    def start(self, load_run, data):
        raise AssertionError("it was started again")

    resumed = stage(trainer, tmp_path / "parts", first)
    monkeypatch.setattr(type(resumed.model), "start", start)
    resumed.fit(resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_start_draws_from_the_seed_alone(trainer, tmp_path, first, monkeypatch):
    toy_stage = type(stage(trainer, tmp_path / "unused", first).model)
    start, drawn = toy_stage.start, []

    def drawing(self, load_run, data):
        drawn.append(float(torch.rand(())))
        start(self, load_run, data)

    monkeypatch.setattr(toy_stage, "start", drawing)
    for number in (1, 2):
        torch.manual_seed(number)
        expected = torch.get_rng_state()
        stage(trainer, tmp_path / f"{number}", first, steps=1).fit()
        assert torch.equal(torch.get_rng_state(), expected)
    assert drawn[0] == drawn[1]


def test_parts_of_parts_are_restored(trainer, tmp_path, first):
    stage(trainer, tmp_path / "second", first).fit()
    third = trainer(tmp_path / "third", {"second": str(tmp_path / "second")}, "toy-nested", steps=4)
    trained = third.fit()
    assert {k: v["model"] for k, v in checkpoint.read_run(tmp_path / "third").parts.items()} == {"second": "toy-stage"}
    assert checkpoint.read_run(tmp_path / "third").parts["second"]["parts"]["first"]["model"] == "toy"
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "second")
    loaded = train.load(tmp_path / "third")
    assert_same(loaded.state_dict(), trained.state_dict())
    assert torch.equal(loaded.sample(3, Key(2)), trained.sample(3, Key(2)))
    assert parts_of(loaded).keys() == {"second"}
    assert parts_of(loaded.second).keys() == {"first"}
    trainer(tmp_path / "third", {"second": str(tmp_path / "second")}, "toy-nested", steps=6).fit(resume=True)
    assert checkpoint.read(tmp_path / "third").step == 6


def test_a_stage_may_begin_with_the_weights_of_a_run_of_its_own_kind(trainer, tmp_path, first):
    stage(trainer, tmp_path / "second", first).fit()
    begun = checkpoint.read(tmp_path / "second")
    shutil.rmtree(first)
    made = stage(trainer, tmp_path / "again", first, start=begun)
    made.begin()
    assert_same(made.model.state_dict(), begun.weights())
    made.fit()
    shutil.rmtree(tmp_path / "second")
    assert_same(train.load(tmp_path / "again").first.state_dict(), made.model.first.state_dict())
    assert checkpoint.read_run(tmp_path / "again").start == str(begun.directory)
    # It goes on without the run that it began with.
    stage(trainer, tmp_path / "again", first, steps=14).fit(resume=True)
    assert checkpoint.read(tmp_path / "again").step == 14


def test_faults_of_what_a_stage_begins_with_are_told(trainer, tmp_path):
    with pytest.raises(ConfigError, match="first: must be the folder of a run of toy, was ''"):
        trainer(tmp_path / "run", plugin="toy-stage").fit()
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        stage(trainer, tmp_path / "run", tmp_path / "nowhere").fit()
    trainer(tmp_path / "sampler", plugin="toy-sampler", steps=1).fit()
    with pytest.raises(PluginError, match=r"'toy-stage'.* is broken: start\(\): AttributeError: .*latent_shape"):
        stage(trainer, tmp_path / "run", tmp_path / "sampler").fit()
    # Nothing was begun that would be in the way.
    assert not checkpoint.checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_without_phases_is_whole_after_no_step(trainer, tmp_path):
    made = trainer(tmp_path / "run", plugin="toy-mean", average={}, validate_every=1, sample_every=1)
    begun = []
    trained = made.fit(begin=lambda: begun.append(True))
    assert (made.total_steps, made.step, begun) == (0, 0, [])
    bars = data.load("bars", "train")
    assert torch.equal(trained.mean, bars.batch(torch.arange(len(bars))).images.mean(0))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000000"]
    loaded = train.load(tmp_path / "run")
    assert not loaded.training
    assert torch.equal(loaded.sample(3, Key(0)), trained.sample(3, Key(0)))
    again = trainer(tmp_path / "run", plugin="toy-mean", average={}, validate_every=1, sample_every=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert torch.equal(again.fit(resume=True).mean, trained.mean)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_fit_in_closed_form(trainer, tmp_path):
    toy_mean = MODELS.load("toy-mean")

    class Gaussian(GenerativeModel):
        """Mean and principal axes of the images: one decomposition, and no step."""

        def __init__(self, config, spec):
            super().__init__(config, spec)
            pixels = torch.Size(spec.image_shape).numel()
            self.register_buffer("mean", torch.zeros(pixels))
            self.register_buffer("axes", torch.zeros(pixels, pixels))

        def start(self, load_run, data):
            images = data.batch(torch.arange(len(data))).images.flatten(1)
            self.mean.copy_(images.mean(0))
            _, scales, axes = torch.linalg.svd(images - self.mean, full_matrices=False)
            self.axes.copy_(scales[:, None] / len(images) ** 0.5 * axes)

        def phases(self):
            return []

        def generate(self, draw):
            from train.toys import noise

            drawn = self.mean + noise(draw.n, len(self.mean), draw.key) @ self.axes
            return drawn.clamp(0, 1).reshape(-1, *self.spec.image_shape)

    plugin = ModelPlugin("gaussian", "linear", toy_mean.config, Gaussian)
    trained = trainer(tmp_path / "run", plugin=plugin, steps=None, schedule="cosine").fit()
    assert trained.axes.abs().sum() > 0
    images = data.load("bars", "train").batch(torch.arange(60)).images.flatten(1)
    torch.testing.assert_close(trained.axes.T @ trained.axes, torch.cov(images.T, correction=0), atol=1e-6, rtol=1e-4)
    assert_same(weights(tmp_path / "run"), trained.state_dict())
    assert trained.sample(2, Key(0)).shape == (2, 1, 4, 4)


def test_a_model_whose_start_fails_is_named(trainer, tmp_path, monkeypatch):
    made = trainer(tmp_path / "run", plugin="toy-mean")
    monkeypatch.setattr(type(made.model), "start", lambda self, load_run, data: 1 / 0)
    with pytest.raises(PluginError, match=r"model plugin 'toy-mean' .* is broken: start\(\): ZeroDivisionError"):
        made.fit()
